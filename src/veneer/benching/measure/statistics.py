"""Statistics of repeated measurements: a median, its interval, and whether two measurements differ.

Times on a shared machine have long tails, so nothing here uses a mean. The interval is that of the median, by the
bootstrap (Efron, "Bootstrap methods: another look at the jackknife", 1979): resample with replacement, take the
median of each, and cut off 2.5 % at either end.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

RESAMPLES = 2000
CONFIDENCE = 0.95
# Fewer samples than this say nothing about their scatter.
ENOUGH = 3


@dataclass(frozen=True)
class Spread:
    """Median and scatter of a repeated measurement.

    Attributes:
        median: of the samples.
        low: the lower end of the median's 95 % interval.
        high: its upper end.
        mad: the median absolute deviation from the median.
        count: how many samples there are.
    """

    median: float
    low: float
    high: float
    mad: float
    count: int

    @property
    def relative(self) -> float:
        """The larger half of the interval as a share of the median."""
        half = max(self.high - self.median, self.median - self.low)
        return half / abs(self.median) if self.median else 0.0


def spread(samples: Sequence[float]) -> Spread:
    """Compute the median and the scatter of one sample or more."""
    middle = statistics.median(samples)
    low, high = interval(samples)
    mad = statistics.median(abs(value - middle) for value in samples)
    return Spread(middle, low, high, mad, len(samples))


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Compute the bootstrap interval of the median; the same samples give the same interval every time."""
    if len(samples) < 2 or min(samples) == max(samples):
        return min(samples), max(samples)
    return _bootstrap(tuple(samples))


@lru_cache(maxsize=1024)  # a report shows each figure several times
def _bootstrap(samples: tuple[float, ...]) -> tuple[float, float]:
    generator = random.Random(len(samples))
    medians = sorted(statistics.median(generator.choices(samples, k=len(samples))) for _ in range(RESAMPLES))
    cut = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    return medians[cut], medians[-cut - 1]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divide measurements by others of the same rounds, so that a drift of both cancels."""
    return [a / b for a, b in zip(over, under, strict=False) if b]


def differ(a: Spread, b: Spread, least: float) -> bool:
    """Tell whether two measurements differ beyond noise: their intervals are disjoint, their medians ``least`` apart.

    Args:
        a: one measurement, of ``ENOUGH`` samples; with fewer the answer is no.
        b: the other measurement.
        least: the smallest share of ``b`` that matters.
    """
    apart = a.low > b.high or a.high < b.low
    large = abs(a.median - b.median) >= least * abs(b.median)
    return apart and large and min(a.count, b.count) >= ENOUGH
