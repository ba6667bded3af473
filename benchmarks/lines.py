"""Keeps the figures of a script, and makes their table: one beside another of the same run, the target, the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HEAD = "| what | figure | beside | ratio | target | |\n|---|--:|--:|--:|---|---|"


@dataclass(frozen=True)
class Line:
    """A line of a table; ``{name}`` in its words and names stands for the figure of that name.

    Attributes:
        what: in words.
        figure: the name of the figure.
        over: the name of the figure that it is divided by, if any.
        unit: of both.
        least: a target: the least that the ratio may be.
        most: a target: the most that the ratio may be; the figure, where it is divided by none.
        more: a target: by how much the figure may exceed the other.
    """

    what: str
    figure: str
    over: str | None = None
    unit: str = "s"
    least: float | None = None
    most: float | None = None
    more: float | None = None

    def row(self, figures: Mapping[str, float]) -> str | None:
        """Return the row of the table; ``None`` where a figure was not measured."""
        names = [name.format_map(figures) for name in (self.figure, self.over) if name]
        if not all(name in figures for name in names):
            return None
        number, *others = (figures[name] for name in names)
        other = others[0] if others else None
        cells = [self.what.format_map(figures), quantity(number, self.unit)]
        cells += ["", ""] if other is None else [quantity(other, self.unit), f"{number / other:.2f}"]
        return f"| {' | '.join([*cells, *self._verdict(number, other)])} |"

    def _verdict(self, number: float, other: float | None) -> tuple[str, str]:
        ratio = number if other is None else number / other
        if self.least is not None:
            return f"at least {self.least:g}", _met(ratio >= self.least)
        if self.more is not None and other is not None:
            return f"at most {quantity(self.more, self.unit)} more", _met(number <= other + self.more)
        if self.most is not None:
            limit = f"{self.most:g}" if other is not None else quantity(self.most, self.unit)
            return f"at most {limit}", _met(ratio <= self.most)
        return "", ""


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def keep(file: Path, name: str, figures: Mapping[str, float]) -> None:
    """Write the figures of a run into a file, beside those of other runs."""
    results = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**results, name: figures}, indent=1) + "\n")


def rows(lines: Iterable[Line], figures: Mapping[str, float]) -> list[str]:
    """Return the rows of the lines whose figures were measured."""
    return [row for line in lines if (row := line.row(figures)) is not None]


def tables(lines: Iterable[Line], runs: Mapping[str, Mapping[str, float]]) -> str:
    """Write a table of the same lines for each run, below the run's name."""
    return "\n\n".join(f"{name}:\n\n" + "\n".join([HEAD, *rows(lines, run)]) for name, run in runs.items())


def quantity(number: float, unit: str) -> str:
    """Write a number and its unit; seconds in the unit that suits them."""
    if unit != "s":
        return f"{rounded(number)} {unit}".rstrip()
    unit, size = next(((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if number >= size), ("µs", 1e-6))
    return f"{rounded(number / size)} {unit}"


def rounded(number: float) -> str:
    """Write three digits, and commas between thousands."""
    return f"{float(f'{number:.3g}'):,g}"
