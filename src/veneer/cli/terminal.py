"""What commands print: results on standard output, progress on standard error and only to a person."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from veneer.printable import one_line, written


def for_stdout(text: str) -> str:
    """The text as it is where a program reads it, and as what a terminal cannot be steered by where a person does."""
    return written(text) if sys.stdout.isatty() else text


def show(value: Any, as_json: bool) -> None:
    """Print something that has ``to_dict()`` and ``__rich__()``: as JSON, or as its panel."""
    if as_json:
        print(json.dumps(value.to_dict(), indent=2))
        return
    from rich.console import Console

    Console().print(value)


@contextmanager
def progress(first: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done; the block calls the given function when something new begins."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    from rich.text import Text

    with console.status(first) as status:
        yield lambda step: status.update(Text(one_line(step)))


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Silence other libraries' bars and logs; collect Veneer's warnings, as they come, to be told when it suits."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    # Its errors are raised, too, and told by Veneer; logged, they cite a checkpoint as it stands.
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(False)
    told: list[str] = []

    def note(message: Warning | str, category: type[Warning], filename: str, *where: object, **more: object) -> None:
        if "veneer" in filename or "adapter" in str(message):
            told.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield told


def tell(warnings_: list[str]) -> None:
    """Print warnings on standard error, each once."""
    for text in dict.fromkeys(warnings_):
        print(f"warning: {one_line(text)}", file=sys.stderr)
