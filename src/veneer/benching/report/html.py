"""Writes a run as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import zip_longest

from veneer.benching import formats
from veneer.benching.report.content import HOW, ReportTable, context, facts, present, samples_table
from veneer.benching.report.panels import Panel, panels
from veneer.benching.result import VARIANTS, BenchData
from veneer.printing import printable

# The colours are those of Okabe and Ito, which people with any kind of colour vision tell apart; lighter in the dark.
_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c1d1f; --faint: #56595e; --line: #d5d7da;
  --note: #8a4b00; --base: #8c9196; --merged: #0072b2; --unmerged: #e08a00; --switching: #009e73; --mixed: #b8578f;
  --resident: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #ececea; --faint: #a9adb3;
  --line: #3a3d42; --note: #f0b95b; --base: #80868c; --merged: #56b4e9; --unmerged: #e69f00; --switching: #2fbf94;
  --mixed: #d88bb8; --resident: #a8d8f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--faint); margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .75rem; }
.context { color: var(--faint); font-size: .9rem; margin: .25rem 0 0; }
.advice { border-left: .3rem solid var(--ink); padding-left: 1rem; margin: 1rem 0 0; }
.advice strong { display: block; font-size: clamp(1.35rem, 5vw, 2rem); line-height: 1.2; margin-bottom: .75rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; max-width: 48rem; } li { margin: .3rem 0; }
.cautions li { color: var(--note); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; color: var(--faint); font-size: .9rem; }
.key::before, .whisker::before { content: ""; display: inline-block; width: 1.1rem; margin-right: .4rem; }
.key::before { height: .7rem; background: var(--key); }
.whisker::before { border-top: 2px solid var(--ink); vertical-align: middle; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; min-width: 0;
  margin: 0 0 1rem; break-inside: avoid; }
.pair { display: grid; grid-template-columns: 4fr 5fr; gap: 0 1rem; }
/* The plot and its figures stand side by side where there is room. */
.panel { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
.plots { flex: 1 1 18rem; max-width: 24rem; min-width: 0; } .figures { flex: 1 1 22rem; min-width: 0; }
figure { margin: 0; } figure + figure { margin-top: 1rem; }
figcaption { color: var(--faint); font-size: .9rem; margin-bottom: .25rem; }
.card svg { display: block; width: 100%; height: auto; } .card svg text { font-family: inherit !important; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; max-width: 100%; }
.facts, .samples { width: 100%; }
th, td { padding: .4rem 0 .4rem 1.25rem; text-align: right; vertical-align: top; }
th { color: var(--faint); font-weight: 500; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
td:first-child { overflow-wrap: anywhere; min-width: 6rem; }
th:first-child, td:first-child, .facts td, .samples td { text-align: left; }
tr + tr td { border-top: 1px solid var(--line); }
.facts td:last-child { overflow-wrap: anywhere; } .facts td:first-child { color: var(--faint); }
.samples td:last-child { min-width: 16rem; }
tr.chosen td { font-weight: 600; }
.note { color: var(--faint); font-size: .9rem; margin: .75rem 0 0; max-width: 48rem; }
/* A narrow page has no room for many columns: cells stand side by side below their row's name, each under its own. */
@media (max-width: 56rem) { .plots { max-width: none; } .figures { flex-basis: 100%; }
  .pair { display: block; }
  .narrow th, .narrow td { padding-left: .75rem; }
  .narrow th:first-child, .narrow td:first-child { padding-left: 0; }
  .wide, .facts, .samples { width: 100%; } .wide thead, .samples thead { display: none; }
  .wide tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr));
    padding: .5rem 0; gap: .25rem .75rem; }
  .wide tr + tr, .facts tr + tr, .samples tr + tr { border-top: 1px solid var(--line); }
  .wide tr + tr td, .facts tr + tr td, .samples tr + tr td { border-top: none; }
  .wide td { padding: 0; text-align: left; min-width: 0; overflow-wrap: anywhere; }
  .wide td:first-child, .wide td:not([data-head]) { grid-column: 1 / -1; font-weight: 600; }
  .wide td:empty { display: none; }
  .wide td[data-head]::before { content: attr(data-head); display: block; color: var(--faint); font-size: .85rem;
    font-weight: 400; }
  .facts tr, .samples tr, .facts td, .samples td { display: block; padding: .1rem 0; }
  .facts tr, .samples tr { padding: .5rem 0; } .samples td:first-child { font-weight: 600; }
  .samples td[data-head]::before { content: attr(data-head) ": "; color: var(--faint); } }
summary { cursor: pointer; font-weight: 600; } footer { color: var(--faint); font-size: .9rem; margin-top: 2.5rem; }
"""
# A table of so few columns is one on a phone too.
_NARROW = 3


def html(report: BenchData) -> str:
    """Write the whole report: summary, plots, tables, machine, method, raw samples."""
    said = report.recommendation
    cautions = [*said.cautions, *report.notes]
    adapters = formats.listed([adapter.name for adapter in report.setup.adapters])
    body = [
        f"<h1>Merge or not? {_text(adapters)} on {_text(report.setup.base)}</h1>",
        f'<p class="context">{_text(context(report))}</p>',
        f'<div class="advice"><strong>{_text(said.headline)}</strong>{_items(said.reasons)}'
        f"{_items(cautions, 'cautions')}</div>",
        "<h2>What was found</h2>",
        _legend(report),
        *_panels(report),
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


def _legend(report: BenchData) -> str:
    """Write the meaning of colours and whiskers."""
    keys = [f'<span class="key" style="--key: var(--{name})">{VARIANTS[name]}</span>' for name in present(report)]
    whisker = '<span class="whisker">95 % interval of the median</span>'
    return f'<p class="legend">{" ".join([*keys, whisker])}</p>'


def _panels(report: BenchData) -> list[str]:
    """Write the panels, those without plots side by side."""
    shown = panels(report)
    bare = [_panel(panel) for panel in shown if not panel.plots]
    return [*(_panel(panel) for panel in shown if panel.plots), f'<div class="pair">{"".join(bare)}</div>']


def _panel(panel: Panel) -> str:
    drawn = "".join(_plot(caption, svg, panel.table.title) for caption, svg in panel.plots.items())
    figures = f'<div class="plots">{drawn}</div>' if drawn else ""
    content = f'<div class="panel">{figures}<div class="figures">{_rows(panel.table)}</div></div>'
    return f'<section class="card"><h3>{_text(panel.table.title)}</h3>{content}</section>\n'


def _plot(caption: str, drawn: str, title: str) -> str:
    labelled = drawn.replace("<svg ", f'<svg role="img" aria-label="{_text(caption)}" ', 1)
    shown = "" if caption == title else f"<figcaption>{_text(caption)}</figcaption>"
    return f"<figure>{shown}{labelled}</figure>\n"


def _table(table: ReportTable, kind: str = "") -> str:
    return f'<section class="card">{_rows(table, kind)}</section>\n'


def _rows(table: ReportTable, kind: str = "") -> str:
    heads = "".join(f"<th>{_text(name)}</th>" for name in table.columns)
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    rows = "".join(f"<tr{_chosen(row)}>{_cells(table.columns, row)}</tr>\n" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    kind = kind or ("narrow" if len(table.columns) <= _NARROW else "wide")
    return f'<table class="{kind}">{head}<tbody>{rows}</tbody></table>{note}'


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
