"""What is recommended, in words, and how long a run will take."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

import veneer
from tests.benching import examples
from veneer.benching import formats
from veneer.benching.decide.recommendation import recommend
from veneer.benching.measure.progress import Progress, Timeline
from veneer.benching.result import Recommendation

ONE = examples.setup(("pirate",))


def words(advice: Recommendation) -> str:
    return formats.plain(" ".join([advice.headline, *advice.reasons, *advice.cautions]))


def test_one_adapter_worth_merging() -> None:
    advice = examples.report(ONE).recommendation
    assert advice.decision == "merge"
    assert advice.headline == "Merge pirate."
    # A row's part of eight: first token 0.128 s, then 32 steps of 0.027 s shared by eight; a tenth more unmerged.
    request = 0.128 + 32 * 0.027 / 8
    assert advice.plans[1].request == pytest.approx(request, rel=0.01)
    assert advice.plans[0].request == pytest.approx(1.1 * request, rel=0.01)
    assert "9.1 % less" in words(advice)
    earned = "Merging pirate takes 100 ms and saves 23.6 ms a request: it is earned back after 5 requests."
    assert earned in words(advice)
    assert advice.cautions == ()


def test_a_gain_within_the_noise_is_said_to_be() -> None:
    advice = examples.report(ONE, unmerged=1.015).recommendation
    assert (advice.decision, advice.headline) == ("unmerged", "Leave pirate unmerged.")
    assert "within the noise of 2.0 %" in words(advice)


def test_no_gain_is_never_earned_back() -> None:
    advice = examples.report(ONE, unmerged=0.95).recommendation
    assert advice.decision == "unmerged"
    assert "merging saves nothing" in words(advice)
    assert "never earned back" in words(advice)
    assert advice.break_even.requests is None


def test_adapters_that_change_often_stay_unmerged() -> None:
    advice = examples.report(ONE, limits={"requests_per_change": 3}).recommendation
    assert advice.decision == "unmerged"
    assert "earned back after 5 requests, and the adapters change every 3 requests" in words(advice)


def test_several_adapters() -> None:
    advice = examples.report(limits={"in_flight": 1}).recommendation
    assert (advice.decision, advice.headline) == (
        "merge",
        "Merge pirate, json and brief, each into a model of its own.",
    )
    assert examples.report(mixed=1.1).recommendation.headline == "Leave pirate, json and brief unmerged, on one base."
    one_model = {"in_flight": 1, "memory": 1.0e9, "traffic": {"pirate": 0.5, "json": 0.3, "brief": 0.2}}
    advice = examples.report(limits=one_model).recommendation
    assert (advice.decision, advice.headline) == (
        "merge-hottest",
        "Merge pirate, and leave json and brief unmerged on one base.",
    )
    assert "would cost" in words(advice)
    assert "that needs" in words(advice)


def test_the_merged_copies_of_the_hottest_beside_the_base() -> None:
    one_model = {"in_flight": 1, "memory": 1.15e9, "traffic": {"pirate": 0.5, "json": 0.3, "brief": 0.2}}
    report = examples.report(limits=one_model, resident=1.01)
    advice = report.recommendation
    assert (advice.decision, advice.headline) == (
        "merge-hottest",
        "Keep pirate and json merged beside the base, and leave brief unmerged.",
    )
    assert advice.call == "model.keep_merged('pirate', 'json')"
    line = (
        "model.keep_merged('pirate', 'json') does it, in 210 MB for each adapter. A step takes 20.0 ms on the base, "
        "20.0 ms merged, 20.2 ms with its copy kept and 22.0 ms unmerged."
    )
    assert line in formats.plain(words(advice))
    console = Console(record=True, width=300)
    console.print(report)
    text = console.export_text()
    assert line in text
    assert "merge pirate and json, beside the base" in text
    assert "merged copy kept" in text
    assert "make the merged copy of one adapter" in text
    assert veneer.BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    # Without a measured copy each of the merged is a model of its own.
    assert examples.report(limits=one_model).recommendation.call == ""
    assert examples.report(ONE, resident=1.0).recommendation.decision == "merge"


def test_a_merged_model_that_is_faster_alone_is_explained() -> None:
    assert "share no batch" in words(examples.report(mixed=1.1).recommendation)
    assert "share no batch" not in words(examples.report(mixed=1.1, unmerged=0.95).recommendation)
    assert "share no batch" not in words(examples.report(ONE, unmerged=1.015).recommendation)


def test_cautions() -> None:
    differing = examples.report(ONE, agreement=0.85)
    assert "85 % of the likeliest choices and 7 of 8 greedy answers are as unmerged" in words(differing.recommendation)
    assert "No way of serving" in words(examples.report(ONE, limits={"memory": 10**6}).recommendation)
    assert "more than the largest batch" in words(examples.report(ONE, limits={"in_flight": 64}).recommendation)
    assert "too few to tell noise" in words(examples.report(replace(ONE, repeats=2)).recommendation)


def test_drift_that_all_share_is_no_noise() -> None:
    wild = (1.0, 1.4, 0.7, 1.2, 0.9)
    assert examples.report(ONE, jitter=wild).recommendation.margin == 0.02
    figures = examples.figures(ONE, jitter=wild)
    alone = [replace(f, samples=f.samples[::-1]) if f.variant == "unmerged" else f for f in figures]
    advice = recommend(ONE, alone, examples.fidelity(ONE), examples.requirements(ONE), ["it has no effect"])
    assert advice.margin > 0.1
    assert "scatter by" in words(advice)
    assert advice.cautions[-1] == "it has no effect"


def test_a_part_that_scatters_counts_by_its_share_of_a_request() -> None:
    wild = (1.0, 1.4, 0.7, 1.2, 0.9)
    found = examples.figures(ONE)
    shaken = [
        replace(f, samples=tuple(value * j for value, j in zip(f.samples, wild, strict=True)))
        if (f.quantity, f.variant, f.batch) == ("first", "unmerged", 1)
        else f
        for f in found
    ]
    # A row's first token takes 0.128 of its 0.768 seconds.
    margin = recommend(ONE, shaken, examples.fidelity(ONE), examples.requirements(ONE)).margin
    assert 0.02 < margin < 0.4 / 4


def test_the_time_left_is_learned_from_what_is_done() -> None:
    now = [0.0]
    told: list[Progress] = []
    timeline = Timeline(told.append, clock=lambda: now[0])
    timeline.plan("short", 2, 1.0)
    timeline.plan("long", 2, 10.0)
    for kind, seconds in (("short", 2.0), ("long", 40.0), ("short", 2.0), ("long", 40.0)):
        with timeline.step(kind, kind):
            now[0] += seconds
    # After the first a long one is guessed at ten times it; after a long one it is known.
    assert [progress.left for progress in told] == [None, 2.0 + 2 * 20.0, 2.0 + 40.0, 40.0]
    assert [progress.done for progress in told] == [0, 2, 42, 44]
    assert timeline.left() == 0
