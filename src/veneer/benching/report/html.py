"""Writes a run as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import zip_longest

from veneer.benching import formats
from veneer.benching.report.content import HOW, ReportTable, facts, plans_table, samples_table, tables
from veneer.benching.report.plots import plots
from veneer.benching.result import BenchData
from veneer.printing import printable

# The colours are those of Okabe and Ito, which people with any kind of colour vision tell apart; lighter in the dark.
_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c1d1f; --faint: #56595e; --line: #d5d7da;
  --note: #8a4b00; --base: #8c9196; --merged: #0072b2; --unmerged: #e08a00; --switching: #009e73; --mixed: #b8578f; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #ececea; --faint: #a9adb3;
  --line: #3a3d42; --note: #f0b95b; --base: #80868c; --merged: #56b4e9; --unmerged: #e69f00; --switching: #2fbf94;
  --mixed: #d88bb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--faint); margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .75rem; }
.advice { border-left: .3rem solid var(--merged); padding-left: 1rem; margin: 1rem 0 0; }
.advice strong { display: block; font-size: clamp(1.35rem, 5vw, 2rem); line-height: 1.2; margin-bottom: .75rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; max-width: 48rem; } li { margin: .3rem 0; }
.cautions li { color: var(--note); }
.cards { columns: 3 18rem; column-gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; min-width: 0;
  margin: 0 0 1rem; break-inside: avoid; }
.card svg { display: block; width: 100%; max-width: 26rem; height: auto; margin: 0 auto; }
.card svg text { font-family: inherit !important; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th { color: var(--faint); font-weight: 500; border-bottom: 1px solid var(--line); }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
th:first-child, td:first-child, .facts td, .samples td { text-align: left; }
td + td { padding-left: .5rem; } tr + tr td { border-top: 1px solid var(--line); }
.facts td:last-child { white-space: normal; overflow-wrap: anywhere; } .facts td:first-child { color: var(--faint); }
.samples td:last-child { white-space: normal; min-width: 16rem; }
tr.chosen td { font-weight: 600; }
.note { color: var(--faint); font-size: .9rem; margin: .75rem 0 0; max-width: 48rem; }
/* A narrow page has no room for columns: each cell becomes a line that names its own. */
@media (max-width: 56rem) { thead { display: none; } tr { display: block; padding: .5rem 0; }
  tr + tr { border-top: 1px solid var(--line); } tr + tr td { border-top: none; }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; white-space: normal; }
  td + td { padding-left: 1rem; } td:empty { display: none; } td:first-child { font-weight: 600; }
  td[data-head]::before { content: attr(data-head); color: var(--faint); font-weight: 400; text-align: left; }
  .facts td, .samples td { display: block; } .samples td[data-head]::before { content: attr(data-head) ": "; } }
summary { cursor: pointer; font-weight: 600; } footer { color: var(--faint); font-size: .9rem; margin-top: 2.5rem; }
"""


def html(report: BenchData) -> str:
    """Write the whole report: summary, plots, tables, machine, method, raw samples."""
    said = report.recommendation
    cautions = [*said.cautions, *report.notes]
    adapters = formats.listed([adapter.name for adapter in report.setup.adapters])
    body = [
        f"<h1>Merge or not? {_text(adapters)} on {_text(report.setup.base)}</h1>",
        f'<div class="advice"><strong>{_text(said.headline)}</strong>{_items(said.reasons)}</div>',
        _items(cautions, "cautions"),
        "<h2>In pictures</h2>",
        f'<div class="cards">{"".join(_plot(title, drawn) for title, drawn in plots(report))}</div>',
        "<h2>In numbers</h2>",
        *(_table(table) for table in (plans_table(report), *tables(report))),
        "<h2>What was measured, and where</h2>",
        _table(ReportTable("", (), tuple(facts(report))), "facts"),
        "<h2>How the figures were taken</h2>",
        _items(HOW),
        f"<details><summary>Raw samples</summary>{_table(samples_table(report), 'samples')}</details>",
        f"<footer>veneer bench, {_text(report.made)}</footer>",
    ]
    return _PAGE.format(title=_text(said.headline), style=_STYLE, body="\n".join(body))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def _plot(title: str, drawn: str) -> str:
    labelled = drawn.replace("<svg ", f'<svg role="img" aria-label="{_text(title)}" ', 1)
    return f'<figure class="card"><h3>{_text(title)}</h3>{labelled}</figure>\n'


def _table(table: ReportTable, kind: str = "") -> str:
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    heads = "".join(f"<th>{_text(name)}</th>" for name in table.columns)
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    rows = "".join(f"<tr{_chosen(row)}>{_cells(table.columns, row)}</tr>\n" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    drawn = f'<table class="{kind}">{head}<tbody>{rows}</tbody></table>'
    return f'<section class="card">{title}{drawn}{note}</section>\n'


def _chosen(row: Sequence[str]) -> str:
    return ' class="chosen"' if row[-1] == "recommended" else ""


def _cells(columns: Sequence[str], row: Sequence[str]) -> str:
    """Write a row's cells; all but the first name their column, for narrow pages."""
    heads = ["", *(f' data-head="{_text(name)}"' if name else "" for name in columns[1:])]
    return "".join(f"<td{head}>{_text(text)}</td>" for head, text in zip_longest(heads, row, fillvalue=""))


def _items(texts: Sequence[str], kind: str = "") -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{_text(text)}</li>" for text in texts)}</ul>' if texts else ""


def _text(text: str) -> str:
    """Escape text from files and arguments for a page; non-breaking spaces stay."""
    return escape("".join(c if c in "\u00a0\u202f" else printable(c) for c in text))
