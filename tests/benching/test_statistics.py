"""The statistics: a median, how far it may be off, and whether two differ."""

from __future__ import annotations

import random

import pytest

from veneer.benching.measure.statistics import differ, interval, ratios, spread


def noisy(middle: float, count: int = 9, seed: int = 1) -> list[float]:
    generator = random.Random(seed)
    return [middle * (1 + generator.uniform(-0.05, 0.05)) for _ in range(count)]


def test_the_median_ignores_a_straggler() -> None:
    found = spread([1.0, 1.1, 0.9, 1.0, 60.0])
    assert (found.median, found.count) == (1.0, 5)
    assert found.mad == pytest.approx(0.1)
    assert spread([1.0, 2.0]).median == 1.5


def test_the_interval_holds_the_median_and_repeats_itself() -> None:
    samples = noisy(1.0)
    low, high = interval(samples)
    assert min(samples) <= low <= spread(samples).median <= high <= max(samples)
    assert interval(samples) == (low, high)
    assert interval([3.0]) == (3.0, 3.0)
    assert spread([3.0, 3.0, 3.0]).relative == 0


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(100):
        low, high = interval([random.Random(1000 + seed * 20 + i).gauss(10, 1) for i in range(15)])
        hits += low <= 10 <= high
    assert 86 <= hits <= 100


def test_more_samples_narrow_it() -> None:
    assert spread(noisy(1.0, 101)).relative < spread(noisy(1.0, 9)).relative


def test_a_difference_needs_distance_size_and_samples() -> None:
    assert differ(spread(noisy(1.2)), spread(noisy(1.0, seed=2)), 0.03)
    assert not differ(spread(noisy(1.01)), spread(noisy(1.0, seed=2)), 0.03)
    assert not differ(spread([1.001] * 5), spread([1.0] * 5), 0.03)
    assert not differ(spread([1.2, 1.2]), spread([1.0] * 5), 0.03)


def test_ratios_cancel_what_drifts() -> None:
    drift = [1.0, 1.5, 2.0, 0.7]
    assert ratios([1.1 * d for d in drift], drift) == pytest.approx([1.1] * 4)
    assert ratios([1.0], [0.0]) == []
