"""Merge or not: the cost model. Pure functions over measured figures; `docs/bench.md` explains it in words.

There are ``n`` adapters; adapter ``i`` gets the share ``s_i`` of the requests, the hottest first. Plan ``k`` merges
the ``k`` hottest, each into a model of its own, and leaves the others unmerged on one base that they share. So
``k = 0`` stays unmerged and ``k = n`` merges everything. ``C`` requests are in flight, each to an adapter drawn by
its share.

    T(b) = F + R b                        one decode step of b rows: a part that is fixed, a part for each row
    E(s) = F (1 - (1 - s)^C) + R C s      its expected time where a model gets the share s of C rows; T(0) = 0
    S_k  = sum of s_i for i > k           the share that stays unmerged
    step(k)    = sum of E_merged(s_i) for i <= k, + E_unmerged(S_k)
    request(k) = (1 - S_k) P_merged + S_k P_unmerged + steps * step(k) / C
    cost(k)    = request(k) + (n * attach + k * merge) / Q
    memory(0)  = runtime + base + adapters
    memory(k)  = memory(0) + kept + (k - 1) * merged        0 < k < n: the first is merged in place, and unmergeable
    memory(n)  = runtime + n * merged

``P`` is the time to the first token, ``steps`` the decode steps after it, ``Q`` the requests between two changes of
the adapters, ``kept`` the original weights that an unmergeable merge keeps. Several unmerged adapters that share a
base have figures of their own ("shared"): one for each row, and a switch between requests. Times are seconds, memory
is bytes.

The plan with the least cost that fits the memory wins; among those within a margin of it, which is the noise of
the measurement, the one that merges least: a gain that cannot be told from noise is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """The seconds of one step, as an affine function of its rows.

    Attributes:
        fixed: seconds whatever the number of rows: reading the weights.
        row: seconds more for each row.
    """

    fixed: float
    row: float

    @classmethod
    def through(cls, points: Mapping[int, float]) -> Speed:
        """Fit a least-squares line through rows -> seconds, both its parts not negative.

        A single point counts as fixed: reading the weights takes most of the time.
        """
        rows, seconds = list(points), list(points.values())
        mean_rows, mean_seconds = sum(rows) / len(rows), sum(seconds) / len(seconds)
        variance = sum((r - mean_rows) ** 2 for r in rows)
        covariance = sum((r - mean_rows) * (s - mean_seconds) for r, s in zip(rows, seconds, strict=True))
        slope = max(covariance / variance, 0.0) if variance else 0.0
        if mean_seconds >= slope * mean_rows:
            return cls(mean_seconds - slope * mean_rows, slope)
        return cls(0.0, sum(r * s for r, s in points.items()) / sum(r * r for r in rows))

    def expected(self, share: float, in_flight: int) -> float:
        """Compute the seconds of a step of a model that each of ``in_flight`` rows belongs to with chance ``share``."""
        return self.fixed * (1 - (1 - share) ** in_flight) + self.row * in_flight * share


@dataclass(frozen=True)
class MeasuredCosts:
    """The figures that the cost model requirements.

    Attributes:
        first: seconds to a request's first token: "merged", "unmerged" (one adapter), "shared" (several, after a
            switch); zero where there is no decode.
        step: one decode step (or one forward pass): "merged", "unmerged" (one adapter), "shared" (several).
        steps: the number of steps of a request.
        attach: seconds to attach one adapter.
        merge: seconds to merge one.
        runtime: the most bytes that a process needs beside its weights while it answers.
        base: bytes of the base's weights.
        merged: bytes of a merged model's weights.
        kept: bytes of the original weights that a merge in place keeps.
        adapters: bytes of each adapter's tensors, by name.
    """

    first: Mapping[str, float]
    step: Mapping[str, Speed]
    steps: int
    attach: float
    merge: float
    runtime: int
    base: int
    merged: int
    kept: int
    adapters: Mapping[str, int]


@dataclass(frozen=True)
class Requirements:
    """The traffic, and the limits of serving it.

    Attributes:
        traffic: adapter -> its share of the requests; they sum to 1. The hottest first.
        memory: the budget, in bytes.
        requests_per_change: requests between two changes of the adapters; infinite when they never change.
        in_flight: requests that are answered at the same time.
        margin: the smallest gain, as a share, that exceeds the measurement's noise.
    """

    traffic: Mapping[str, float]
    memory: float
    requests_per_change: float = math.inf
    in_flight: int = 1
    margin: float = 0.02


@dataclass(frozen=True)
class ServingPlan:
    """One way of serving the adapters.

    Attributes:
        merged: the adapters that are merged, each into a model of its own.
        unmerged: the adapters that share one base.
        request: seconds of the machine for one request.
        change: seconds that changes of the adapters add to a request.
        memory: bytes needed.
        fits: whether the memory suffices.
    """

    merged: tuple[str, ...]
    unmerged: tuple[str, ...]
    request: float
    change: float
    memory: float
    fits: bool

    @property
    def cost(self) -> float:
        """Seconds for one request, changes included."""
        return self.request + self.change


@dataclass(frozen=True)
class BreakEven:
    """The requests after which a plan's merges are earned back.

    Attributes:
        merges: seconds of the merges.
        saving: seconds that each request saves; not positive when it saves none.
        requests: the number of requests whose savings outweigh the merges; ``None`` when none does.
    """

    merges: float
    saving: float
    requests: float | None


def plans(measured: MeasuredCosts, requirements: Requirements) -> list[ServingPlan]:
    """Make plan ``k`` for each ``k`` from 0 to the number of adapters."""
    names = sorted(requirements.traffic, key=lambda name: -requirements.traffic[name])
    return [_plan(measured, requirements, tuple(names[:k]), tuple(names[k:])) for k in range(len(names) + 1)]


def _plan(
    measured: MeasuredCosts, requirements: Requirements, merged: tuple[str, ...], unmerged: tuple[str, ...]
) -> ServingPlan:
    replaced = len(merged + unmerged) * measured.attach + len(merged) * measured.merge
    memory = needed_memory(measured, merged, unmerged)
    return ServingPlan(
        merged=merged,
        unmerged=unmerged,
        request=request_seconds(measured, requirements, merged, unmerged),
        change=replaced / requirements.requests_per_change,
        memory=memory,
        fits=memory <= requirements.memory,
    )


def request_seconds(
    measured: MeasuredCosts, requirements: Requirements, merged: Sequence[str], unmerged: Sequence[str]
) -> float:
    """Compute the seconds of the machine for one request, first token and the others."""
    rest = sum(requirements.traffic[name] for name in unmerged)
    kind = "shared" if len(unmerged) > 1 else "unmerged"
    step = sum(measured.step["merged"].expected(requirements.traffic[name], requirements.in_flight) for name in merged)
    step += measured.step[kind].expected(rest, requirements.in_flight)
    first = (1 - rest) * measured.first["merged"] + rest * measured.first[kind]
    return first + measured.steps * step / requirements.in_flight


def needed_memory(measured: MeasuredCosts, merged: Sequence[str], unmerged: Sequence[str]) -> float:
    """Compute the bytes that a plan needs while it answers."""
    if not unmerged:
        return measured.runtime + len(merged) * measured.merged
    adapters = sum(measured.adapters.values())
    extra = measured.kept + (len(merged) - 1) * measured.merged if merged else 0
    return measured.runtime + measured.base + adapters + extra


def choose(candidates: Sequence[ServingPlan], margin: float) -> ServingPlan:
    """Choose the plan that merges least among those within ``margin`` of the cheapest that fits.

    When no plan fits the memory, choose the one that needs least.
    """
    fitting = [plan for plan in candidates if plan.fits]
    if not fitting:
        return min(candidates, key=lambda plan: plan.memory)
    least = min(plan.cost for plan in fitting)
    return next(plan for plan in fitting if plan.cost <= least * (1 + margin))


def break_even(measured: MeasuredCosts, stay: ServingPlan, other: ServingPlan) -> BreakEven:
    """Compute after how many requests ``other``, which merges, beats ``stay``, which does not."""
    merges = len(other.merged) * measured.merge
    saving = stay.request - other.request
    return BreakEven(merges, saving, merges / saving if saving > 0 else None)
