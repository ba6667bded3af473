"""Two runs side by side, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from veneer.benching import formats
from veneer.benching.compare import Change, Comparison
from veneer.benching.report.content import ABSENT, Table
from veneer.benching.report.terminal import rich_table

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {"worse": "bold red", "better": "bold green"}


def shown(comparison: Comparison) -> RenderableType:
    """What changed, what did not, and what to be careful about."""
    changed = [change for change in comparison.changes if change.verdict != "same"]
    rows = tuple(_row(change) for change in changed)
    columns = ("figure", "variant", "input", "old", "new", "new / old", "verdict")
    parts: list[RenderableType] = []
    if rows:
        table = rich_table(Table(f"From {comparison.old} to {comparison.new}", columns, rows))
        for row, change in zip(table.rows, changed, strict=True):
            row.style = _STYLES.get(change.verdict, "")
        parts.append(table)
    parts += [Text(_summary(comparison)), *(Text(f"Note: {caution}", "yellow") for caution in comparison.cautions)]
    return Group(*parts)


def _summary(comparison: Comparison) -> str:
    counts = {v: sum(c.verdict == v for c in comparison.changes) for v in ("worse", "better", "same", "as the base")}
    text = f"{counts['worse']} worse, {counts['better']} better, {counts['same']} the same within noise"
    return text + (f", {counts['as the base']} changed as the base alone did." if counts["as the base"] else ".")


def _row(change: Change) -> tuple[str, ...]:
    text = formats.seconds if change.unit == "s" else formats.nbytes
    size = formats.count(change.batch, "row") + (f" of {change.length}" if change.length else "")
    return (
        change.quantity,
        change.variant,
        size if change.batch else ABSENT,
        text(change.old),
        text(change.new),
        formats.number(change.ratio),
        change.verdict,
    )
