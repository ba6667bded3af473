"""Prints for commands: results on standard output, progress on standard error and only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from veneer.errors import UsageError
from veneer.printing import one_line, printable_prose


def for_stdout(text: str) -> str:
    """Return the text as it is for a pipe, and in a form that cannot steer it for a terminal."""
    return printable_prose(text) if sys.stdout.isatty() else text


def show(value: Any, as_json: bool) -> None:
    """Print a report as JSON, or as its panel."""
    if as_json:
        print(json.dumps(value.to_dict(), indent=2))
        return
    from rich.console import Console

    Console().print(value)


@contextmanager
def progress(first: str, lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Show the step under way; the block calls the given function when another begins.

    Args:
        first: the first step.
        lines: where standard error is no terminal, print each further step as a line; else none.
    """
    if not sys.stderr.isatty():
        yield _print_step if lines else lambda step: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(first) as status:
        yield lambda step: status.update(Text(one_line(step)))


def _print_step(step: str) -> None:
    print(one_line(step), file=sys.stderr, flush=True)


def print_warnings(warnings: list[str]) -> None:
    """Print warnings on standard error, each once."""
    for text in dict.fromkeys(warnings):
        print(f"warning: {one_line(text)}", file=sys.stderr)


@contextmanager
def decoding_stdin() -> Iterator[None]:
    """Turn the failure to decode standard input inside the block into ``UsageError``."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError("Standard input is no text in this terminal's encoding.", hint="Give it as UTF-8.") from error
