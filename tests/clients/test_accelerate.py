"""accelerate and torch on two processes: DDP, and weights sharded by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients import conftest

AsRecorded = Callable[[Any], None]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, base: Path, tmp_path: Path, as_recorded: AsRecorded) -> None:
    """One step of each process on its own row, saved, loaded again."""
    script = Path(__file__).parent / "two_processes.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {
        **os.environ,
        **{"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0", "CUDA_VISIBLE_DEVICES": ""},
    }
    if not conftest.RECORDING:
        environment["VENEER_AS_PEFT"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(script), kind, str(base), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    as_recorded(json.loads((tmp_path / "figures.json").read_text()))
