"""Prepares what Veneer prints: printable text, sizes, panels of facts, reports, and warnings."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


# Characters of prose that are not printable to Python: line end, tab, and the joiners of letters and emoji.
_PROSE = frozenset("\n\t\u200c\u200d")

# A size as it is typed, and the bytes of its unit in lower case: 1 GB is 10^9 bytes, as files have it; 1 GiB is 2^30.
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", re.ASCII)
_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": int(1000**power) for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": int(1024**power) for power, letter in enumerate("kmgt", 1)},
}


def printable(text: str) -> str:
    r"""Return ``text`` with each control character and lone surrogate written as its escape, such as ``\x1b``."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def printable_prose(text: str) -> str:
    r"""Return a model's answer, printable, with its tabs, its joiners and its spaces of any width."""
    return "".join(c if c in _PROSE or unicodedata.category(c) == "Zs" else printable(c) for c in text)


def one_line(text: str) -> str:
    """Return ``text``, printable, on a single line; each run of white space becomes one space."""
    return printable(" ".join(text.split()))


def nbytes(value: int) -> str:
    """Return bytes in the largest unit that fits, such as ``270.9 MB``; units are decimal, as for files."""
    shown, unit = float(value), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if shown < 1000:
            break
        shown, unit = shown / 1000, larger
    return f"{shown:.0f} {unit}" if unit == "B" else f"{shown:.1f} {unit}"


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size such as ``16GB``, ``512 MiB`` or ``1000000``; ``None`` where it is none."""
    size = _SIZE.fullmatch(text)
    value = float(size[1]) * _UNITS.get(size[2].lower(), 0) if size else 0
    return round(value) if 1 <= value < math.inf else None


def panel(
    title: str | Text,
    facts: Iterable[tuple[str | Text, str | Text]],
    warnings: Sequence[str] = (),
    border: str = "green",
) -> RenderableType:
    """Make a panel with a row for each fact and for each warning; strings are made printable.

    Args:
        title: the panel's.
        facts: name and value of each row.
        warnings: texts of the last rows.
        border: the border's colour.
    """
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in [*facts, *((Text("warning", "yellow"), warning) for warning in warnings)]:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return Panel(table, title=title, title_align="left", border_style=border, expand=False)


class AsJson:
    """A dataclass that can be written as JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)


class Report(AsJson):
    """A dataclass that can be written as JSON, and that rich prints as a panel with a row for each fact."""

    _title: ClassVar[str]

    def __rich__(self) -> RenderableType:
        return panel(self._title, self._facts(), self._warnings(), self._border())

    def _facts(self) -> Sequence[tuple[str, str]]:
        """Return name and value of each row."""
        raise NotImplementedError

    def _warnings(self) -> Sequence[str]:
        """Return what a user should know, for the last rows."""
        return ()

    def _border(self) -> str:
        """Return the border's colour."""
        return "green"


class VeneerWarning(UserWarning):
    """A warning from Veneer: something works, and may not be what was meant."""


class IdleNameWarning(VeneerWarning, RuntimeWarning):
    """A warning of a name in a config that means nothing; peft's is a ``RuntimeWarning``."""


def warn(message: str, kind: type[VeneerWarning] = VeneerWarning) -> None:
    """Give a ``VeneerWarning`` at the nearest line outside of this package; its text cannot steer a terminal."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "veneer":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(printable(message), kind, stacklevel=depth)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Silence other libraries' bars, logs and warnings; collect the texts of Veneer's warnings as they come.

    For a process of our own: a transformers that is not imported yet is told by the environment, as importing it for
    this would take half a second.
    """
    texts: list[str] = []

    def collect(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        if issubclass(category, VeneerWarning):
            texts.append(str(message))

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" not in sys.modules:
        os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    with quiet_transformers() if "transformers" in sys.modules else nullcontext(), warnings.catch_warnings():
        logging.captureWarnings(False)
        warnings.simplefilter("always")
        warnings.showwarning = collect
        yield texts


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and logs while the block runs."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    # Its errors are raised, too, and reported by Veneer; logged, they cite a checkpoint as it stands.
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not blank, or its class's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def progress(what: str, shown: bool) -> Iterator[None]:
    """Show on the terminal that something is under way inside the block, if it is to be shown; in a log, a line."""
    if not shown:
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(what)
    with console.status(what):
        yield
