"""Counts the work of an engine: its steps, and what its bank wrote; imports no torch."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PHASES = ("schedule", "forward", "sample")


@dataclass(frozen=True)
class Distribution:
    """Counts values by ranges, as the histograms of Prometheus do.

    Attributes:
        bounds: the largest value of each range but the last, which has none.
        counts: the number of values in each range.
        total: the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    def __add__(self, other: Distribution) -> Distribution:
        counts = tuple(count + more for count, more in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.total + other.total)


@dataclass(frozen=True)
class EngineWork:
    """The work of an engine since it was made.

    Attributes:
        began: when it was made, in seconds since the epoch.
        seconds: phase of a step -> how long it took.
        sizes: ``tokens`` and ``adapters`` of a step.
        bank: a counter of the bank -> its value.
    """

    began: float = 0.0
    seconds: Mapping[str, Distribution] = field(default_factory=dict)
    sizes: Mapping[str, Distribution] = field(default_factory=dict)
    bank: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: EngineWork) -> EngineWork:
        return EngineWork(
            max(self.began, other.began),
            _sum(self.seconds, other.seconds),
            _sum(self.sizes, other.sizes),
            _sum(self.bank, other.bank),
        )


def _sum(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Add the values of two mappings; one that is in a single mapping stays as it is."""
    both = {key: first[key] + second[key] for key in first.keys() & second.keys()}
    return {**first, **second, **both}


class _Ranges:
    """Counts values by ranges, in place."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._total)


class StepMeter:
    """Measures the steps of an engine, on the thread that computes them."""

    def __init__(self) -> None:
        self._began = time.time()
        self._seconds = {phase: _Ranges(SECONDS) for phase in PHASES}
        self._sizes = {size: _Ranges(SIZES) for size in ("tokens", "adapters")}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a phase of a step, unless it fails."""
        started = time.monotonic()
        yield
        self.took(name, time.monotonic() - started)

    def took(self, phase: str, seconds: float) -> None:
        """Count a phase of a step."""
        self._seconds[phase].add(seconds)

    def computed(self, tokens: int, adapters: int) -> None:
        """Count the tokens and the adapters of a step."""
        self._sizes["tokens"].add(tokens)
        self._sizes["adapters"].add(adapters)

    def work(self, bank: Mapping[str, int]) -> EngineWork:
        """Return all that was measured, beside the counters of the bank; any thread may ask."""
        seconds, sizes = (
            {key: ranges.distribution() for key, ranges in measured.items()}
            for measured in (self._seconds, self._sizes)
        )
        return EngineWork(self._began, seconds, sizes, bank)
