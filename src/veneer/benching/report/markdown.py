"""Writes a run as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from veneer.benching.report.content import HOW, ReportTable, context, facts, plans_table, samples_table, tables
from veneer.benching.result import BenchData
from veneer.printing import one_line


def markdown(report: BenchData) -> str:
    """Write the whole report: summary, tables, machine, method, raw samples."""
    said = report.recommendation
    parts = [
        "# Merge or not?",
        _text(context(report)),
        f"**{_text(said.headline)}**",
        _items(said.reasons),
        _items([f"Note: {caution}" for caution in (*said.cautions, *report.notes)]),
        *map(_table, (plans_table(report), *tables(report))),
        _table(ReportTable("What was measured, and where", ("", ""), tuple(facts(report)))),
        "## How the figures were taken",
        _items(HOW),
        _table(samples_table(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: ReportTable) -> str:
    lines = [table.columns, ("---",) + ("--:",) * (len(table.columns) - 1), *table.rows]
    drawn = "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)
    return f"## {_text(table.title)}\n\n{drawn}" + (f"\n\n{_text(table.note)}" if table.note else "")


def _items(texts: Sequence[str]) -> str:
    return "\n".join(f"- {_text(text)}" for text in texts)


def _text(text: str) -> str:
    """Escape text so that Markdown shows it as it is.

    Characters of HTML, and the end of a cell, become entities: not every reader of Markdown allows a backslash there.
    """
    return escape(re.sub(r"([\\`*_\[\]#~$])", r"\\\1", one_line(text)), quote=False).replace("|", "&#124;")
