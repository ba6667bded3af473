"""What Veneer prints: text without control characters, and panels of facts."""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


# Beside what prints: a line's end, a tab, and the invisible characters that join or part letters and emoji.
_WRITING = frozenset("\n\t\u200c\u200d")


def printable(text: str) -> str:
    r"""``text`` with each control character and lone surrogate written as its escape, such as ``\x1b``."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def written(text: str) -> str:
    r"""A model's answer for a terminal: the same, but tabs, spaces of any width and joiners stay as they are."""
    return "".join(c if c in _WRITING or unicodedata.category(c) == "Zs" else printable(c) for c in text)


def one_line(text: str) -> str:
    """The same on a single line, its runs of white space as one space."""
    return printable(" ".join(text.split()))


def panel(
    title: str, facts: Iterable[tuple[str, str]], warnings: Sequence[str] = (), border: str = "green"
) -> RenderableType:
    """One row a fact, warnings last.

    Args:
        title: the panel's.
        facts: name and value of each row.
        warnings: what a user should know.
        border: the border's colour.
    """
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts:
        table.add_row(Text(printable(name)), Text(printable(value)))
    for warning in warnings:
        table.add_row(Text("warning", "yellow"), Text(printable(warning)))
    return Panel(table, title=title, title_align="left", border_style=border, expand=False)


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


def tell(message: str) -> None:
    """Warn at the nearest line outside of this package; what a checkpoint says in it steers no terminal."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "veneer":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(printable(message), stacklevel=depth)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
