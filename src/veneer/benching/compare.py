"""Compares two runs: which figures became slower or faster beyond noise.

A machine is not the same from day to day, so a time is compared with that of the base alone, which ran in the same
rounds: a change of both is reported as the machine's (or the base's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from veneer.benching import formats
from veneer.benching.measure.statistics import ENOUGH, differ, ratios, spread
from veneer.benching.report.content import ABSENT, ReportTable
from veneer.benching.report.terminal import rich_table
from veneer.benching.result import BenchData, Figure
from veneer.errors import UsageError
from veneer.printing import AsJson

if TYPE_CHECKING:
    from rich.console import RenderableType


# Smaller changes do not matter, however certain.
LEAST = 0.03
_TIMED = ("first", "decode", "forward")


@dataclass(frozen=True)
class FigureChange:
    """One figure in two runs.

    Attributes:
        quantity: as in :class:`Figure`, or "perplexity"; larger is worse for all of them.
        variant: the model measured; for perplexity "base" or an adapter's name.
        batch: rows, or 0.
        length: tokens of a row, or 0.
        unit: "s" or "B"; empty for perplexity.
        old: the median before.
        new: the median now.
        verdict: "worse", "better", "same" within noise, or "as the base": the base alone changed as much.
    """

    quantity: str
    variant: str
    batch: int
    length: int
    unit: str
    old: float
    new: float
    verdict: str

    @property
    def ratio(self) -> float:
        """The new median over the old one."""
        return self.new / self.old if self.old else 1.0


@dataclass(frozen=True)
class Comparison(AsJson):
    """The changes from one run to another.

    Attributes:
        old: when the first run was made.
        new: when the second run was made.
        changes: every figure that both have.
        cautions: reasons not to trust the comparison.
    """

    old: str
    new: str
    changes: tuple[FigureChange, ...]
    cautions: tuple[str, ...]

    @property
    def regressions(self) -> list[FigureChange]:
        """The figures that became worse beyond noise."""
        return [change for change in self.changes if change.verdict == "worse"]

    def __rich__(self) -> RenderableType:
        """Make a table of the changes, and a line on the rest."""
        return as_rich(self)


def compare(old: BenchData, new: BenchData) -> Comparison:
    """Compare two runs.

    Raises:
        UsageError: the runs have no figure in common.
    """
    changes = (*_changes(old, new), *_changes_of_perplexity(old, new))
    if not changes:
        raise UsageError("The two runs have no figure in common.", hint="Compare runs with the same inputs.")
    return Comparison(old.made, new.made, changes, tuple(_cautions(old, new)))


def _changes(old: BenchData, new: BenchData) -> Iterator[FigureChange]:
    for figure in new.figures:
        before = old.find(*figure.key)
        if before is None:
            continue
        change = (*figure.key, figure.unit, before.spread.median, figure.spread.median)
        yield FigureChange(*change, verdict=_verdict(old, before, new, figure))


def _changes_of_perplexity(old: BenchData, new: BenchData) -> Iterator[FigureChange]:
    """Compare base and adapters on the same tokens, read in the same way."""
    known = {(found.adapter, found.tokens, found.window): found.unmerged for found in old.perplexity}
    for found in new.perplexity:
        before = known.get((found.adapter, found.tokens, found.window))
        if before is not None and old.setup.texts == new.setup.texts:
            ratio = found.unmerged / before
            verdict = "worse" if ratio > 1 + LEAST else "better" if ratio < 1 - LEAST else "same"
            yield FigureChange("perplexity", found.adapter or "base", 0, 0, "", before, found.unmerged, verdict)


def _verdict(old: BenchData, before: Figure, new: BenchData, now: Figure) -> str:
    if now.unit == "B":
        changed = abs(now.spread.median - before.spread.median) > LEAST * abs(before.spread.median)
    else:
        changed = differ(now.spread, before.spread, LEAST)
    if not changed:
        return "same"
    relative = _against_base(old, before), _against_base(new, now)
    if all(relative) and not differ(spread(relative[1]), spread(relative[0]), LEAST):
        return "as the base"
    return "worse" if now.spread.median > before.spread.median else "better"


def _against_base(report: BenchData, figure: Figure) -> list[float]:
    """Divide a time by that of the base alone, round by round; empty for the base itself, or without its time."""
    base = report.find(figure.quantity, "base", figure.batch or 0, figure.length or 0)
    if base is None or figure.variant == "base" or figure.quantity not in _TIMED:
        return []
    return ratios(figure.samples, base.samples)


def _cautions(old: BenchData, new: BenchData) -> Iterator[str]:
    for what in ("model_class", "parameters", "dtype", "device"):
        before, now = getattr(old.setup, what), getattr(new.setup, what)
        if before != now:
            yield f"Different models or settings: {what.replace('_', ' ')} was {before} and is {now}."
    for what in ("cpu", "cores", "threads", "accelerator"):
        before, now = getattr(old.machine, what), getattr(new.machine, what)
        if before != now:
            yield f"Different machines: {what} was {before} and is {now}."
    for package, version in new.machine.versions.items():
        if old.machine.versions.get(package) not in (None, version):
            yield f"{package} was {old.machine.versions[package]} and is {version}."
    if min(old.setup.repeats, new.setup.repeats) < ENOUGH:
        yield f"A run of fewer than {ENOUGH} rounds tells no change from noise."


_STYLES = {"worse": "bold red", "better": "bold green"}


def as_rich(comparison: Comparison) -> RenderableType:
    """Make a table of the changes, a summary, and the cautions."""
    changed = [change for change in comparison.changes if change.verdict != "same"]
    rows = tuple(_row(change) for change in changed)
    columns = ("figure", "variant", "input", "old", "new", "new / old", "verdict")
    parts: list[RenderableType] = []
    if rows:
        table = rich_table(ReportTable(f"From {comparison.old} to {comparison.new}", columns, rows))
        for row, change in zip(table.rows, changed, strict=True):
            row.style = _STYLES.get(change.verdict, "")
        parts.append(table)
    parts += [Text(_summary(comparison)), *(Text(f"Note: {caution}", "yellow") for caution in comparison.cautions)]
    return Group(*parts)


def _summary(comparison: Comparison) -> str:
    counts = {v: sum(c.verdict == v for c in comparison.changes) for v in ("worse", "better", "same", "as the base")}
    text = f"{counts['worse']} worse, {counts['better']} better, {counts['same']} the same within noise"
    return text + (f", {counts['as the base']} changed as the base alone did." if counts["as the base"] else ".")


def _row(change: FigureChange) -> tuple[str, ...]:
    text = {"s": formats.seconds, "B": formats.nbytes}.get(change.unit, formats.number)
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
