"""How much memory each step takes: a base is never held twice beyond what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.large.memory_steps import LAYERS, WIDTH

BASE = LAYERS * WIDTH * WIDTH * 4 / 2**20
LAYER = 1 / LAYERS
# The adapters and noise, as a share of the base. A second base would be 1.
NOISE = 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's own account of memory")
def test_the_base_is_never_held_twice_beyond_what_is_said() -> None:
    program = Path(__file__).with_name("memory_steps.py")
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    peak = {step: figures["peak"] / BASE for step, figures in found.items()}
    held = {step: figures["held"] / BASE for step, figures in found.items()}
    for step in ("attach", "switch", "mixed batch", "unmerge"):
        assert peak[step] < NOISE, found
    # The originals of the adapted layers are kept: one more base, and a layer that is being worked on.
    assert held["merge"] == pytest.approx(1, abs=NOISE), found
    assert peak["merge"] < 1 + LAYER + NOISE, found
    assert held["unmerge"] == pytest.approx(-1, abs=NOISE), found
    # A layer at a time, of which the old weight goes when the new one is there.
    assert peak["merge for good"] < 2 * LAYER + NOISE, found
    assert abs(held["merge for good"]) < NOISE, found
