"""Runs scripts that each show a fault, one process a script, forked from one that has imported the libraries already.

``python -m tests.fault_scripts FOLDER`` prints a JSON object: script's name -> [exit code, what it printed].
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path

SECONDS = 240
# What the scripts import, which takes longer than what they do.
LIBRARIES = ("torch", "transformers", "peft", "veneer", "safetensors.torch", "transformers.trainer")
# What they import of veneer by a path of before its rooms -> the module that has it now.
FORMER = {"config": "configs.base", "layer": "layers.adapted_layer"}


def import_libraries() -> None:
    """Import what the scripts import, and let former paths lead to the modules of today."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for former, path in FORMER.items():
        module = sys.modules[f"veneer.{former}"] = importlib.import_module(f"veneer.{path}")
        setattr(sys.modules["veneer"], former, module)


def run(script: Path, log: Path) -> int:
    """The exit code of a script, run in a child of this process; what it prints goes to ``log``."""
    child = os.fork()
    if child == 0:
        _become(script, log)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _become(script: Path, log: Path) -> None:
    """Run a script in this process, and end it."""
    code = 0
    signal.alarm(SECONDS)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))
    try:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            tempfile.tempdir = place
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path) -> None:
    """Run every script of a folder, and print what came of it."""
    import_libraries()
    results = {}
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        for script in sorted(folder.glob("*.py")):
            code = run(script, log)
            results[script.stem] = [code, log.read_text(encoding="utf-8", errors="replace")]
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
