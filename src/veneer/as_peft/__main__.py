"""Runs a script or module in which ``import peft`` means Veneer: ``python -m veneer.as_peft script.py ...``."""

from __future__ import annotations

import os
import runpy
import sys

_USAGE = "usage: python -m veneer.as_peft (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> None:
    """Run the script or module that the arguments name, as Python itself would."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(_USAGE, file=sys.stdout if arguments and arguments != ["-m"] else sys.stderr)
        raise SystemExit(0 if arguments and arguments != ["-m"] else 2)
    # The processes that a script starts (torchrun, workers of a data loader) take it over.
    os.environ["VENEER_AS_PEFT"] = "1"
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    if not os.path.exists(script):  # noqa: PTH110
        print(f"There is no script {script!r}. {_USAGE}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # noqa: PTH100, PTH120
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
