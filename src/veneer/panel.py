"""The panel that every report prints as."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from veneer.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType


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
