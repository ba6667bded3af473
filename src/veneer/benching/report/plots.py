"""Draws the report's plots: SVG for a page, whose style sheet gives the colours for light and dark.

matplotlib writes fixed colours; each one used here stands for a variable of the page and is replaced by it. Colour
alone tells nothing: every bar has its name beside it and its value at its end, every line its own dashes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing
from matplotlib.transforms import blended_transform_factory

from veneer.benching import formats
from veneer.benching.report import content
from veneer.benching.result import VARIANTS, BenchData, Figure

# Name of the page's variable -> the colour that stands for it here.
COLOURS = {
    "ink": "#010101",
    "faint": "#020202",
    "line": "#030303",
    **{name: f"#0{index}0404" for index, name in enumerate(VARIANTS)},
}
_WIDTH, _ROW = 3.7, 0.235  # inches
_LEFT, _TIP = 0.26, 0.99  # where bars begin, and where the text at their tips must end, as shares of the width
_LETTER = 6.0  # points: the width of a digit in the widest of the usual fonts
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["faint"],
    "xtick.color": COLOURS["faint"],
    "ytick.color": COLOURS["ink"],
}


@dataclass(frozen=True)
class Bar:
    """One bar: name, value, interval, colour, the text at its end, and whether it is more than an outline."""

    name: str
    value: float
    low: float
    high: float
    colour: str
    text: str
    is_filled: bool = True


def speed(report: BenchData, measure: content.Measure) -> str:
    """Draw a quantity of speed, a group of bars for each size of input."""
    groups = []
    for size in content.sizes(report):
        figures = {v: report.find(measure.quantity, v, *size) for v in content.present(report)}
        bars = [_bar(VARIANTS[v], v, figure, measure, size) for v, figure in figures.items() if figure]
        groups.append((content.size_name(report, size), bars))
    return _bars(groups, measure.title)


def _bar(name: str, colour: str, figure: Figure, measure: content.Measure, size: tuple[int, int]) -> Bar:
    spread = figure.spread
    value, *ends = (measure.value(seconds, *size) for seconds in (spread.median, spread.low, spread.high))
    return Bar(name, value, min(ends), max(ends), colour, measure.text(spread.median, *size))


def loading(report: BenchData, quantity: str) -> str:
    """Draw time or memory of the models in fresh processes; nothing where all are the same."""
    bars = []
    text = formats.seconds if quantity == "load" else formats.nbytes
    for variant, name in (("base", "base alone"), ("unmerged", "unmerged"), ("merged", "merged")):
        figure = report.find(quantity, variant)
        if figure is not None:
            spread = figure.spread
            bars.append(Bar(name, spread.median, spread.low, spread.high, variant, text(spread.median)))
    return _bars([("", bars)], quantity) if len({bar.text for bar in bars}) > 1 else ""


def plans(report: BenchData) -> str:
    """Draw the cost of each plan, the recommended one filled; nothing where the choice is between two."""
    if len(report.recommendation.plans) <= 2:
        return ""
    bars = []
    for index, plan in content.shown_plans(report):
        name = "none" if not plan.merged else "all" if not plan.unmerged else f"hottest {len(plan.merged)}"
        text = f"{formats.seconds(plan.cost)}, {formats.nbytes(plan.memory) if plan.fits else 'too large'}"
        chosen = index == report.recommendation.chosen
        bars.append(Bar(name, plan.cost, plan.cost, plan.cost, "ink", text, is_filled=chosen))
    return _bars([("", bars)], "plans")


def _bars(groups: Sequence[tuple[str, Sequence[Bar]]], salt: str) -> str:
    """Draw bars from left to right, below the name of their group."""
    rows = sum(len(bars) + bool(name) for name, bars in groups)
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        drawing = Drawing(figsize=(_WIDTH, rows * _ROW + 0.15))
        axes = drawing.add_axes((_LEFT, 0.01, _TIP - _LEFT, 0.98))
        largest = max((bar.high for _, bars in groups for bar in bars), default=1.0) or 1.0
        longest = max((len(bar.text) for _, bars in groups for bar in bars), default=1)
        for_text = min(_LETTER * longest / (72 * _WIDTH * (_TIP - _LEFT)), 0.75)
        axes.set(xlim=(0, 1.03 * largest / (1 - for_text)), ylim=(rows - 0.4, -0.6))
        axes.axis("off")
        across = blended_transform_factory(drawing.transFigure, axes.transData)
        place = 0
        for name, bars in groups:
            if name:
                axes.text(0.005, place, name, transform=across, va="center", weight="bold")
                place += 1
            for bar in bars:
                _draw(axes, bar, place, largest)
                place += 1
        axes.plot([0, 0], [-0.5, rows - 0.5], color=COLOURS["line"], linewidth=1)
        return _svg(drawing)


def _draw(axes: Any, bar: Bar, place: int, largest: float) -> None:
    colour = COLOURS[bar.colour]
    axes.barh(place, bar.value, height=0.72, color=colour if bar.is_filled else "none", edgecolor=colour, linewidth=0.8)
    if bar.high > bar.low:
        axes.plot([bar.low, bar.high], [place, place], color=COLOURS["ink"], linewidth=1.2, solid_capstyle="butt")
    axes.text(-0.02 * largest, place, bar.name, ha="right", va="center", color=COLOURS["faint"], fontsize=9.5)
    axes.text(max(bar.value, bar.high) + 0.02 * largest, place, bar.text, va="center", fontsize=9.5)


def break_even(report: BenchData) -> str:
    """Draw the seconds of a request, its part of the merges included, over the number of requests that share them."""
    advice = report.recommendation
    stay, other = advice.plans[0], advice.plans[advice.compared]
    even = advice.break_even
    middle = even.requests if even.requests else 100 * max(even.merges / stay.request if stay.request else 1, 1)
    first, last = max(middle / 100, 1), max(middle * 100, 1000)
    counts = [first * (last / first) ** (step / 200) for step in range(201)]
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "break-even"}):
        drawing = Drawing(figsize=(_WIDTH, 2.7))
        axes = drawing.add_axes((0.13, 0.18, 0.79, 0.54))
        factor, unit = _unit(stay.request)
        flat = [factor * stay.request] * len(counts)
        curve = [factor * (other.request + even.merges / count) for count in counts]
        axes.plot(counts, flat, color=COLOURS["unmerged"], linewidth=2.2, label="nothing merged")
        label = _short(f"{formats.listed(other.merged)} merged")
        axes.plot(counts, curve, color=COLOURS["merged"], linewidth=2.2, dashes=(5, 1.5), label=label)
        ends = sorted((flat[-1], curve[-1]))
        room = max(ends[1] - ends[0], 0.1 * ends[1])
        axes.set(xscale="log", xlim=(first, last), ylim=(max(ends[0] - room, 0), ends[1] + 2.5 * room))
        axes.set_xlabel("requests until the next change of the adapters")
        axes.xaxis.set_major_formatter(lambda value, _: formats.number(value, 1))
        if even.requests is not None and even.requests >= first:
            _mark(axes, even.requests, factor * stay.request)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
        drawing.text(0.02, 0.78, f"{unit} a request, merging included", fontsize=9.5, color=COLOURS["faint"])
        drawing.legend(loc="upper left", frameon=False, bbox_to_anchor=(0.0, 1.03), handlelength=3)
        return _svg(drawing)


def _mark(axes: Any, requests: float, value: float) -> None:
    axes.plot([requests], [value], "o", color=COLOURS["ink"], markersize=6)
    text = f"even after {formats.count(math.ceil(requests), 'request')}"
    axes.annotate(text, (requests, value), xytext=(6, 8), textcoords="offset points")


def _unit(seconds: float) -> tuple[float, str]:
    return (1e3, "milliseconds") if seconds < 1 else (1.0, "seconds")


def _short(text: str) -> str:
    return text if len(text) <= 34 else text[:33] + "…"


def _svg(drawing: Drawing) -> str:
    """Return the drawing's ``<svg>`` element, its colours as variables of the page."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg (.*?)width="[^"]*"(.*?)height="[^"]*"', r"<svg \1\2", text, count=1, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
