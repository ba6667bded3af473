"""Holds the report that ``veneer.bench`` returns: the data of a run, with ways to save and print it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from veneer.benching.report import terminal
from veneer.benching.report.files import write
from veneer.benching.result import BenchData

if TYPE_CHECKING:
    from rich.console import RenderableType


class BenchReport(BenchData):
    """The report of :func:`veneer.bench`: its :class:`~veneer.benching.result.BenchData`, to save and to print."""

    def save(self, folder: str | Path) -> Path:
        """Write the report as HTML, Markdown and JSON, keep the run, and return the HTML file's path."""
        return write(self, Path(folder))

    def __rich__(self) -> RenderableType:
        """Make the recommendation and the tables."""
        return terminal.as_rich(self)
