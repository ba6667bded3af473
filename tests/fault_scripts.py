"""Runs scripts that each show a fault, one process a script, forked from one that has imported the libraries already.

``python -m tests.fault_scripts FOLDER`` prints a JSON object: script's name -> [exit code, what it printed].
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

SECONDS = 240
# What the scripts import, which takes longer than what they do.
LIBRARIES = ("torch", "transformers", "peft", "veneer", "safetensors.torch", "transformers.trainer")
# A few of them reach into the package, by names of before -> the names of today.
FORMER = {
    r"\bveneer\.config\b": "veneer.configs.base",
    r"\bveneer\.layer\b": "veneer.layers.adapted_layer",
    r"AdaptedLayer\._fold\b": "AdaptedLayer._fuse",
    r"layer\._forget\b": "layer.forget_cached",
    r'\["sha256"\]\["\.\./\.\./payload\.pth"\] = ': '["digests"]["../../payload.pth"] = "sha256:" + ',
    # A function of the tokenizer, the prompt, the system's message, and whether the template is used.
    r"from veneer\.cli\.generate_command import _inputs\n": (
        "from types import SimpleNamespace as S; from veneer.cli.text_generator import TextGenerator as G\n"
        "_inputs = lambda t, prompt, *_: G._templated(S(tokenizer=t), [{'role': 'user', 'content': prompt}])\n"
    ),
}


def import_libraries() -> None:
    """Import what the scripts import."""
    for name in LIBRARIES:
        importlib.import_module(name)


def _execute(script: Path) -> None:
    """Run a script as ``__main__``, with the names of today in place of former ones."""
    text = script.read_text(encoding="utf-8")
    for former, name in FORMER.items():
        text = re.sub(former, name, text)
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    main_module.__file__ = str(script)
    exec(compile(text, script, "exec"), main_module.__dict__)


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
            _execute(script)
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
