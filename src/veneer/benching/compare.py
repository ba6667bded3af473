"""Two runs side by side: what became slower or faster beyond noise.

A machine is not the same from day to day, so a time is set against that of the base alone, which ran in the same
rounds: what changed for both is the machine's doing (or the base's), and is said so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from veneer.benching.result import BenchReport, Figure
from veneer.benching.samples import ENOUGH, differ, ratios, spread
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

# Smaller changes do not matter, however sure.
LEAST = 0.03
_TIMED = ("first", "decode", "forward")


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes:
        quantity: as in :class:`Figure`; larger is worse for all of them.
        variant: what was measured.
        batch: rows, or 0.
        length: tokens of a row, or 0.
        unit: "s" or "B".
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
        """New over old."""
        return self.new / self.old if self.old else 1.0


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        old: when the first was made.
        new: when the second was.
        changes: every figure that both have.
        cautions: what makes the comparison weak.
    """

    old: str
    new: str
    changes: tuple[Change, ...]
    cautions: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        """What became worse beyond noise."""
        return [change for change in self.changes if change.verdict == "worse"]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON types."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """A table of what changed, and a line on the rest."""
        from veneer.benching.report.comparison import shown

        return shown(self)


def compare(old: BenchReport, new: BenchReport) -> Comparison:
    """Tell what changed from one run to another.

    Raises:
        ConfigError: they have no figure in common.
    """
    changes = tuple(_changes(old, new))
    if not changes:
        raise ConfigError("The two runs have no figure in common.", hint="Compare runs with the same inputs.")
    return Comparison(old.made, new.made, changes, tuple(_cautions(old, new)))


def _changes(old: BenchReport, new: BenchReport) -> Iterator[Change]:
    for now in new.figures:
        before = old.find(*now.key)
        if before is None:
            continue
        change = (*now.key, now.unit, before.spread.median, now.spread.median)
        yield Change(*change, verdict=_verdict(old, before, new, now))


def _verdict(old: BenchReport, before: Figure, new: BenchReport, now: Figure) -> str:
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


def _against_base(report: BenchReport, figure: Figure) -> list[float]:
    """Round by round, a time over that of the base alone; empty where the base has none, or is it."""
    base = report.find(figure.quantity, "base", figure.batch or 0, figure.length or 0)
    if base is None or figure.variant == "base" or figure.quantity not in _TIMED:
        return []
    return ratios(figure.samples, base.samples)


def _cautions(old: BenchReport, new: BenchReport) -> Iterator[str]:
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
