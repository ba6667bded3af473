"""Merge or not: the cost model. Pure functions over measured figures; `docs/bench.md` explains it in words.

There are ``n`` adapters; adapter ``i`` gets the share ``s_i`` of the requests, the hottest first. Plan ``k`` merges
the ``k`` hottest and leaves the others unmerged on one base that they share, beside which the merged weights are kept
(``keep_merged``). So ``k = 0`` stays unmerged; ``k = n`` merges everything, each into a model of its own. ``C``
requests are in flight, each to an adapter drawn by its share.

    T(b) = F + R b                        one decode step of b rows: a part that is fixed, a part for each row
    E(s) = F (1 - (1 - s)^C) + R C s      its expected time where a model gets the share s of C rows; T(0) = 0
    S_k  = sum of s_i for i > k           the share that stays unmerged
    step(k)    = sum of E_merged(s_i) for i <= k, + E_unmerged(S_k)
    request(k) = (1 - S_k) P_merged + S_k P_unmerged + steps * step(k) / C
    cost(k)    = request(k) + (n * attach + k * merge) / Q
    memory(k)  = runtime + base + adapters + k * kept       k < n
    memory(n)  = runtime + n * merged

``P`` is the time to the first token, ``steps`` the decode steps after it, ``Q`` the requests between two changes of
the adapters, ``kept`` the merged weights of one adapter. For 0 < k < n "merged" means these ("resident"). Where none
can be kept, as on a quantised base, each of the ``k`` is merged into a model of its own, the first in place with
``kept`` for the originals, and memory(k) = memory(0) + kept + (k - 1) * merged. Several unmerged adapters that share a
base have figures of their own ("shared"): one for each row, and a switch between requests. Times are seconds, memory
is bytes.

The plan with the least cost that fits the memory wins; among those within a margin of it, which is the noise of
the measurement, the one that merges least: a gain that cannot be told from noise is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


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
        first: seconds to a request's first token: "merged", "resident" (its merged copy kept), "unmerged" (one
            adapter), "shared" (several, after a switch); zero where there is no decode.
        step: one decode step (or one forward pass), by the same names.
        steps: the number of steps of a request.
        attach: seconds to attach one adapter.
        merge: seconds to merge one.
        runtime: the most bytes that a process needs beside its weights while it answers.
        base: bytes of the base's weights.
        merged: bytes of a merged model's weights.
        kept: bytes of the merged weights of one adapter; as many as those of the originals that a merge in place keeps.
        adapters: bytes of each adapter's tensors, by name.
        keep: seconds to make the merged copy of one adapter; ``None`` where none can be kept.
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
    keep: float | None = None


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
        merged: the adapters that are merged, each into a model of its own unless they are ``resident``.
        unmerged: the adapters that share one base.
        request: seconds of the machine for one request.
        change: seconds that changes of the adapters add to a request.
        memory: bytes needed.
        fits: whether the memory suffices.
        resident: whether the merged weights are kept beside the base of the unmerged ones.
    """

    merged: tuple[str, ...]
    unmerged: tuple[str, ...]
    request: float
    change: float
    memory: float
    fits: bool
    resident: bool = False

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
    resident = bool(merged and unmerged) and measured.keep is not None
    memory = needed_memory(measured, merged, unmerged)
    plan = ServingPlan(
        merged=merged,
        unmerged=unmerged,
        request=request_seconds(measured, requirements, merged, unmerged),
        change=0.0,
        memory=memory,
        fits=memory <= requirements.memory,
        resident=resident,
    )
    replaced = len(merged + unmerged) * measured.attach + merges(measured, plan)
    return replace(plan, change=replaced / requirements.requests_per_change)


def merges(measured: MeasuredCosts, plan: ServingPlan) -> float:
    """Return the seconds of a plan's merges."""
    each = measured.keep if plan.resident and measured.keep is not None else measured.merge
    return len(plan.merged) * each


def request_seconds(
    measured: MeasuredCosts, requirements: Requirements, merged: Sequence[str], unmerged: Sequence[str]
) -> float:
    """Compute the seconds of the machine for one request, first token and the others."""
    rest = sum(requirements.traffic[name] for name in unmerged)
    fast = "resident" if unmerged and measured.keep is not None else "merged"
    kind = "shared" if len(unmerged) > 1 else "unmerged"
    step = sum(measured.step[fast].expected(requirements.traffic[name], requirements.in_flight) for name in merged)
    step += measured.step[kind].expected(rest, requirements.in_flight)
    first = (1 - rest) * measured.first[fast] + rest * measured.first[kind]
    return first + measured.steps * step / requirements.in_flight


def needed_memory(measured: MeasuredCosts, merged: Sequence[str], unmerged: Sequence[str]) -> float:
    """Compute the bytes that a plan needs while it answers."""
    if not unmerged:
        return measured.runtime + len(merged) * measured.merged
    below = measured.runtime + measured.base + sum(measured.adapters.values())
    if measured.keep is not None:
        return below + len(merged) * measured.kept
    return below + (measured.kept + (len(merged) - 1) * measured.merged if merged else 0)


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
    seconds = merges(measured, other)
    saving = stay.request - other.request
    return BreakEven(seconds, saving, seconds / saving if saving > 0 else None)
