"""The examples of ``docs/from-peft.md`` that need a client run, in a folder that holds what the page speaks of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import conftest
from tests.clients.world import save_adapter, save_base

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-peft.md"
EXAMPLE = re.compile(r"^```python (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(EXAMPLE.findall(PAGE.read_text(encoding="utf-8")))


@pytest.mark.skipif(conftest.RECORDING, reason="there are no figures to record")
@pytest.mark.parametrize("client", [name for name in EXAMPLES if name != "as_peft"])
def test_an_example_runs(client: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for seed, name in enumerate(("pirate", "json")):
        save_adapter(tmp_path / "adapters" / name, base, seed=seed)
    (tmp_path / "script.py").write_text(EXAMPLES[client], encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "veneer.as_peft", "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
