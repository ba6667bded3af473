"""The command line: a module a command, imported when it is called.

Exit codes: 0 done, 1 our fault (or a `veneer check` that says no), 2 the input's fault, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from veneer.cli.app import run
    from veneer.errors import VeneerError
    from veneer.printing import one_line

    _escape_unencodable()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return run(list(sys.argv[1:] if arguments is None else arguments))
    except VeneerError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`veneer inspect ... | head`); do not complain again while closing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("VENEER_DEBUG"):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        print(f"internal error: {reason[:300]} (VENEER_DEBUG=1 shows where)", file=sys.stderr)
        return 1


def _print_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Print a Python warning as one line, without the place in the library that gave it."""
    from veneer.printing import one_line

    print(f"warning: {one_line(str(message))}", file=sys.stderr)


def _escape_unencodable() -> None:
    """Let standard output escape characters that its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
