"""Runs a script in a process of its own, in which ``import peft`` means Veneer."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *before: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script with these arguments of Python before it, and return what came of it."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    own = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, "-W", "ignore", *before, textwrap.dedent(script)]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300, check=False)


def printed(script: str) -> list[str]:
    """Return the lines that a script prints when Veneer stands in for peft; it must end well."""
    done = run(f"import veneer.as_peft\n{textwrap.dedent(script)}", "-c")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
