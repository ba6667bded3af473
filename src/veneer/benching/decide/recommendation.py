"""Turns measured figures into a recommendation, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from veneer.benching import formats
from veneer.benching.decide.cost_model import (
    BreakEven,
    MeasuredCosts,
    Requirements,
    ServingPlan,
    Speed,
    break_even,
    choose,
    plans,
)
from veneer.benching.measure.statistics import ENOUGH, ratios, spread
from veneer.benching.result import Fidelity, Figure, Perplexity, Recommendation, Setup, find

# The smallest gain that counts, however little the figures scatter.
LEAST_MARGIN = 0.02
# A margin of noise above this gives a caution.
NOISY = 0.1


@dataclass(frozen=True)
class Figures:
    """Looks figures of a run up.

    Attributes:
        figures: all figures of the run.
        setup: its base, adapters and settings.
    """

    figures: Sequence[Figure]
    setup: Setup

    @property
    def step(self) -> str:
        """The quantity that a model repeats: a decode step, or a forward pass."""
        return "forward" if self.setup.kind == "forward" else "decode"

    @property
    def length(self) -> int:
        """The length that the recommendation is for: the longest."""
        return max(self.setup.lengths, default=0)

    def samples(self, quantity: str, variant: str, batch: int = 0, length: int = 0) -> tuple[float, ...]:
        """Return the samples of a figure, in order; none when it was not measured."""
        figure = find(self.figures, quantity, variant, batch, length)
        return figure.samples if figure else ()

    def median(self, quantity: str, variant: str, batch: int = 0, length: int = 0) -> float:
        """Return the median of a figure; zero when it was not measured."""
        values = self.samples(quantity, variant, batch, length)
        return spread(values).median if values else 0.0

    def speed(self, variant: str, several: str | None = None) -> Speed:
        """Fit the speed of a variant's step; ``several`` names the variant that replaces it from two rows on."""
        kinds = {b: several if several and b > 1 else variant for b in self.setup.batch}
        points = {b: self.median(self.step, kind, b, self.length) for b, kind in kinds.items()}
        return Speed.through(points)

    def first(self, variant: str) -> float:
        """Return the seconds of the machine until a request has its first token."""
        batch = min(self.setup.batch)
        return self.median("first", variant, batch, self.length) / batch

    @property
    def steps(self) -> int:
        """The number of steps of a request after its first token."""
        return 1 if self.setup.kind == "forward" else self.setup.new_tokens - 1

    def requests(self, variant: str, batch: int) -> list[float]:
        """Return the seconds of a whole request, round by round."""
        first, step = (self.samples(quantity, variant, batch, self.length) for quantity in ("first", self.step))
        return [a + self.steps * b for a, b in zip_longest(first, step, fillvalue=0.0)]

    def merged_is_faster(self) -> bool:
        """Tell whether each size of batch takes a merged model less time than an unmerged one."""
        pairs = [
            [self.median(self.step, variant, batch, self.length) for variant in ("merged", "unmerged")]
            for batch in self.setup.batch
        ]
        return all(merged < unmerged for merged, unmerged in pairs)

    def noise(self) -> float:
        """Return the error of the ratio of unmerged to merged, as a share; at least ``LEAST_MARGIN``.

        The ratio is that of whole requests, as in the plans: a part that scatters counts by its share of the time.
        """
        spreads = [
            spread(samples).relative
            for batch in self.setup.batch
            if (samples := ratios(self.requests("unmerged", batch), self.requests("merged", batch)))
        ]
        return max([LEAST_MARGIN, *spreads])


def measured(figures: Figures) -> MeasuredCosts:
    """Collect the figures of a run that the cost model requirements."""
    setup, several = figures.setup, len(figures.setup.adapters) > 1
    shared = figures.speed("switching", "mixed") if several else figures.speed("unmerged")
    base = figures.median("weights", "base")
    return MeasuredCosts(
        first={
            "merged": figures.first("merged"),
            "resident": figures.first("resident"),
            "unmerged": figures.first("unmerged"),
            "shared": figures.first("switching" if several else "unmerged"),
        },
        step={
            "merged": figures.speed("merged"),
            "resident": figures.speed("resident"),
            "unmerged": figures.speed("unmerged"),
            "shared": shared,
        },
        steps=figures.steps,
        attach=figures.median("attach", "unmerged"),
        merge=figures.median("merge", "merged"),
        runtime=max(round(figures.median("serving", "base") - base), 0),
        base=round(base),
        merged=round(figures.median("weights", "merged")),
        kept=round(figures.median("weights", "kept")),
        adapters={a.name: round(figures.median("weights", f"adapter {a.name}")) for a in setup.adapters},
        keep=figures.median("keep", "resident") or None,
    )


def recommend(
    setup: Setup,
    figures: Sequence[Figure],
    fidelity: Sequence[Fidelity],
    requirements: Requirements,
    warnings: Sequence[str] = (),
    perplexity: Sequence[Perplexity] = (),
) -> Recommendation:
    """Weigh the plans for serving the adapters.

    Args:
        setup: base, adapters and settings of the run.
        figures: every figure.
        fidelity: of each adapter.
        requirements: the traffic and the limits.
        warnings: of loading; they become cautions.
        perplexity: of base and adapters, where it was measured.
    """
    by_variant = Figures(figures, setup)
    margin = by_variant.noise()
    costs = measured(by_variant)
    weighed = plans(costs, requirements)
    chosen = choose(weighed, margin)
    other = chosen if chosen.merged else _rival(weighed)
    even = break_even(costs, weighed[0], other)
    verdict = _Verdict(weighed, chosen, other, even, requirements, margin, by_variant)
    return Recommendation(
        decision=verdict.decision,
        headline=verdict.headline(),
        reasons=tuple(verdict.reasons(setup)),
        cautions=(
            *verdict.cautions(setup),
            *_cautions(setup, fidelity, margin),
            *_of_texts(setup, perplexity),
            *warnings,
        ),
        plans=tuple(weighed),
        chosen=weighed.index(chosen),
        compared=weighed.index(other),
        break_even=even,
        traffic=dict(requirements.traffic),
        memory=requirements.memory,
        requests_per_change=None if math.isinf(requirements.requests_per_change) else requirements.requests_per_change,
        in_flight=requirements.in_flight,
        margin=margin,
        call=verdict.call,
    )


def _rival(weighed: Sequence[ServingPlan]) -> ServingPlan:
    """Return the cheapest plan that merges, among those that fit if there are any."""
    merging = [plan for plan in weighed if plan.merged]
    return min([plan for plan in merging if plan.fits] or merging, key=lambda plan: plan.cost)


@dataclass(frozen=True)
class _Verdict:
    """Puts a choice among plans into words."""

    weighed: Sequence[ServingPlan]
    chosen: ServingPlan
    other: ServingPlan
    even: BreakEven
    requirements: Requirements
    margin: float
    figures: Figures

    @property
    def decision(self) -> str:
        """The recommendation as a word for scripts."""
        if not self.chosen.merged:
            return "unmerged"
        return "merge-hottest" if self.chosen.unmerged else "merge"

    @property
    def call(self) -> str:
        """The call of a model with all of the adapters that does what is recommended; empty where none does."""
        return f"model.keep_merged({', '.join(map(repr, self.chosen.merged))})" if self.chosen.resident else ""

    def headline(self) -> str:
        """Write the recommendation as a sentence."""
        merged, unmerged = self.chosen.merged, self.chosen.unmerged
        if not merged:
            return f"Leave {formats.listed(unmerged)} unmerged" + (", on one base." if len(unmerged) > 1 else ".")
        if not unmerged:
            return f"Merge {formats.listed(merged)}" + (", each into a model of its own." if merged[1:] else ".")
        if self.chosen.resident:
            return (
                f"Keep {formats.listed(merged)} merged beside the base, and leave {formats.listed(unmerged)} unmerged."
            )
        base = " on one base" if len(unmerged) > 1 else ""
        return f"Merge {formats.listed(merged)}, and leave {formats.listed(unmerged)} unmerged{base}."

    def reasons(self, setup: Setup) -> list[str]:
        """Write the reasons, in numbers."""
        return [self._gain(setup), *self._call(), *self._sharing(setup), self._break_even(), *self._memory()]

    def _call(self) -> list[str]:
        """Write the call that does what is recommended, with what was measured of it."""
        if not self.call:
            return []
        figures = self.figures
        size = min(figures.setup.batch), figures.length
        names = {"base": "on the base", "merged": "merged", "resident": "with its copy kept", "unmerged": "unmerged"}
        steps = [f"{formats.seconds(figures.median(figures.step, v, *size))} {name}" for v, name in names.items()]
        each = formats.nbytes(figures.median("weights", "kept"))
        return [f"{self.call} does it, in {each} for each adapter. A step takes {formats.listed(steps, len(steps))}."]

    def _gain(self, setup: Setup) -> str:
        stay, other = self.weighed[0], self.other
        gain = 1 - other.request / stay.request if stay.request else 0.0
        text = (
            f"{_request(setup, self.requirements)} takes {formats.seconds(stay.request)} of the machine with "
            f"everything unmerged, and {formats.seconds(other.request)} with {formats.listed(other.merged)} merged"
        )
        if gain <= 0:
            return f"{text}: merging saves nothing."
        text += f": {formats.percent(gain)} less"
        return (
            f"{text}, which is within the noise of {formats.percent(self.margin)}."
            if gain <= self.margin
            else f"{text}."
        )

    def _sharing(self, setup: Setup) -> list[str]:
        """Say why models that are faster each may be slower together."""
        faster = self.figures.merged_is_faster()
        if self.chosen.merged or not (setup.adapters[1:] and faster and self.requirements.in_flight > 1):
            return []
        models = "a base and a merged model" if self.other.unmerged else "several merged models"
        return [
            f"A merged model by itself is the faster one. But {models} share no batch: each then answers a part of the "
            f"{self.requirements.in_flight} requests in flight, where one base answers them together."
        ]

    def _break_even(self) -> str:
        merges = f"Merging {formats.listed(self.other.merged)} takes {formats.seconds(self.even.merges)}"
        if self.even.requests is None:
            return f"{merges}, and is never earned back."
        text = (
            f"{merges} and saves {formats.seconds(self.even.saving)} a request: it is earned back after "
            f"{formats.count(max(math.ceil(self.even.requests), 1), 'request')}"
        )
        every = self.requirements.requests_per_change
        if math.isinf(every):
            return f"{text}."
        return f"{text}, and the adapters change every {formats.count(every, 'request')}."

    def _memory(self) -> list[str]:
        budget = formats.nbytes(self.requirements.memory)
        texts = [f"It needs about {formats.nbytes(self.chosen.memory)} of {budget} of memory."]
        cheaper = [p for p in self.weighed if not p.fits and p.cost < self.chosen.cost * (1 - self.margin)]
        if self.chosen.fits and cheaper:
            best = min(cheaper, key=lambda plan: plan.cost)
            less = formats.percent(1 - best.cost / self.chosen.cost)
            texts.append(
                f"With {formats.listed(best.merged)} merged a request would cost {less} less, and that needs "
                f"{formats.nbytes(best.memory)}."
            )
        return texts

    def cautions(self, setup: Setup) -> list[str]:
        """Write what limits the choice."""
        cautions = []
        if not self.chosen.fits:
            budget = formats.nbytes(self.requirements.memory)
            cautions.append(f"No way of serving the adapters fits into {budget}; this one needs least.")
        if self.requirements.in_flight > max(setup.batch):
            cautions.append(
                f"{self.requirements.in_flight} requests in flight are more than the largest batch measured, "
                f"{max(setup.batch)}: the figures are extended in a straight line."
            )
        return cautions


def _request(setup: Setup, requirements: Requirements) -> str:
    """Describe a request, as the beginning of a sentence."""
    length = f" of {max(setup.lengths)} tokens" if setup.lengths else ""
    answer = "" if setup.kind == "forward" else f" with {setup.new_tokens} new ones"
    together = f", {requirements.in_flight} in flight," if requirements.in_flight > 1 else ""
    return f"A request{length}{answer}{together}"


def _cautions(setup: Setup, fidelities: Sequence[Fidelity], margin: float) -> list[str]:
    cautions = [
        f"{fidelity.adapter}: merged, {formats.listed(_differences(fidelity))} as unmerged; {setup.dtype} rounds the "
        f"merged weights."
        for fidelity in fidelities
        if _differences(fidelity)
    ]
    if setup.repeats < ENOUGH:
        cautions.append(f"Measured {formats.count(setup.repeats, 'time')}: too few to tell noise. --repeats 5 or more.")
    if margin > NOISY:
        cautions.append(
            f"The figures scatter by {formats.percent(margin)}: other work may have been going on. Measure again on a "
            "machine that is left alone, or with more --repeats."
        )
    return cautions


def _of_texts(setup: Setup, measured: Sequence[Perplexity]) -> list[str]:
    """Write which adapters predict the texts worse than the base, or worse for being merged."""
    cautions = []
    for found in measured:
        own, base = (formats.number(value, 4) for value in (found.unmerged, measured[0].unmerged))
        if found.unmerged > measured[0].unmerged:
            cautions.append(
                f"{found.adapter} predicts {setup.texts} worse than the base alone: perplexity {own} against {base}."
            )
        if found.merged is not None and found.merged > found.unmerged * (1 + LEAST_MARGIN):
            merged = formats.number(found.merged, 4)
            cautions.append(f"{found.adapter}: perplexity on {setup.texts} is {merged} merged, {own} unmerged.")
    return cautions


def _differences(fidelity: Fidelity) -> list[str]:
    texts = []
    if fidelity.agreement is not None and fidelity.agreement < 1:
        texts.append(f"{formats.percent(fidelity.agreement)} of the likeliest choices")
    if fidelity.same_texts is not None and fidelity.same_texts < fidelity.prompts:
        texts.append(f"{fidelity.same_texts} of {fidelity.prompts} greedy answers")
    return [*texts[:-1], f"{texts[-1]} are"] if texts else []
