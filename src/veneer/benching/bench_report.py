"""The report that ``veneer.bench`` returns: the data of a run, which can be saved and printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from veneer.benching.report import terminal
from veneer.benching.report.files import write
from veneer.benching.result import BenchData

if TYPE_CHECKING:
    from rich.console import RenderableType


class BenchReport(BenchData):
    """A run of :func:`veneer.bench`: its data (:class:`~veneer.benching.result.BenchData`), to save and to print."""

    def save(self, folder: str | Path) -> Path:
        """Write the report as HTML, Markdown and JSON, and keep the run; returns the HTML file's path."""
        return write(self, Path(folder))

    def __rich__(self) -> RenderableType:
        """The tables and the recommendation."""
        return terminal.shown(self)
