"""Puts each plot beside the table of its figures."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.benching.report import content, plots
from veneer.benching.report.content import ReportTable
from veneer.benching.result import BenchData


@dataclass(frozen=True)
class Panel:
    """Shows one subject of the report.

    Attributes:
        table: its figures; the table's title is the panel's.
        plots: caption -> SVG.
    """

    table: ReportTable
    plots: dict[str, str]


def panels(report: BenchData) -> list[Panel]:
    """Return the panels in the order in which they argue: the choice, the speed, the loading, the rest."""
    choice = {
        "A request, by how many adapters are merged": plots.plans(report),
        "When merging is earned back": plots.break_even(report),
    }
    loading = {"Loading": plots.loading(report, "load"), "Memory while answering": plots.loading(report, "serving")}
    shown = [
        Panel(content.plans_table(report), choice),
        *(
            Panel(content.speed_table(report, measure), {measure.title: plots.speed(report, measure)})
            for measure in content.measures(report)
        ),
        Panel(content.loading_table(report), loading),
        Panel(content.actions_table(report), {}),
        Panel(content.fidelity_table(report), {}),
        Panel(content.perplexity_table(report), {}),
    ]
    return [_with_drawn(panel) for panel in shown if panel.table.rows]


def _with_drawn(panel: Panel) -> Panel:
    return Panel(panel.table, {caption: drawn for caption, drawn in panel.plots.items() if drawn})
