"""Shows a run on the terminal: the recommendation first, then the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table as RichTable

from veneer.benching import formats
from veneer.benching.report.content import ReportTable, plans_table, tables
from veneer.benching.result import BenchData
from veneer.printing import printable

if TYPE_CHECKING:
    from rich.console import RenderableType


def as_rich(report: BenchData) -> RenderableType:
    """Make the recommendation, the plans and every table."""
    return Group(advice(report), *map(rich_table, (plans_table(report), *tables(report))))


def advice(report: BenchData) -> Panel:
    """Make the panel of the recommendation: what to do, why, and what else to know."""
    said = report.recommendation
    lines = [f"[bold]{_safe(said.headline)}[/]", *(_safe(reason) for reason in said.reasons)]
    lines += [f"[yellow]Note[/] {_safe(caution)}" for caution in (*said.cautions, *report.notes)]
    return Panel("\n".join(lines), title="recommendation", title_align="left", border_style="green", expand=False)


def rich_table(table: ReportTable) -> RichTable:
    """Make rich's table of a report's; numbers to the right."""
    drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.columns):
        drawn.add_column(_safe(name), justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*map(_safe, row))
    if table.note:
        drawn.caption, drawn.caption_justify = _safe(table.note), "left"
    return drawn


def _safe(text: str) -> str:
    return escape(printable(formats.plain(text)))
