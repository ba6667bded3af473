"""The cost model's decisions, on figures for which the answer can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from veneer.benching.decide.cost_model import MeasuredCosts, Requirements, ServingPlan, Speed, break_even, choose, plans

GB = 10**9


def measured(unmerged: float = 1.2, shared: float = 1.2, **changes: Any) -> MeasuredCosts:
    """A model that decodes in 10 ms a step, whatever the rows, when merged."""
    values: dict[str, Any] = {
        "first": {"merged": 0.1, "unmerged": 0.1 * unmerged, "shared": 0.1 * shared},
        "step": {
            "merged": Speed(0.01, 0.0),
            "unmerged": Speed(0.01 * unmerged, 0.0),
            "shared": Speed(0.01 * shared, 0.0),
        },
        "steps": 100,
        "attach": 0.01,
        "merge": 1.0,
        "runtime": 1 * GB,
        "base": 10 * GB,
        "merged": 10 * GB,
        "kept": 8 * GB,
        "adapters": {"a": GB // 10, "b": GB // 10, "c": GB // 10},
    }
    return MeasuredCosts(**{**values, **changes})


def decide(figures: MeasuredCosts, traffic: dict[str, float], **options: Any) -> ServingPlan:
    needs = Requirements(**{"traffic": traffic, "memory": 100 * GB, **options})
    return choose(plans(figures, needs), needs.margin)


ONE = {"a": 1.0}


def test_one_adapter_that_is_never_changed_is_merged() -> None:
    plan = decide(measured(), ONE)
    assert (plan.merged, plan.unmerged) == (("a",), ())
    assert plan.request == pytest.approx(0.1 + 100 * 0.01)
    assert plan.memory == 1 * GB + 10 * GB


def test_a_gain_within_the_noise_is_none() -> None:
    assert decide(measured(unmerged=1.01), ONE, margin=0.02).merged == ()
    assert decide(measured(unmerged=1.05), ONE, margin=0.02).merged == ("a",)


def test_an_adapter_that_changes_often_stays_unmerged() -> None:
    # A merge takes 1 s and saves 0.22 s a request, so it is even after 1 / 0.22 = 4.55 requests.
    assert decide(measured(), ONE, requests_per_change=4).merged == ()
    assert decide(measured(), ONE, requests_per_change=10).merged == ("a",)


def test_the_break_even_is_where_the_saving_has_paid_for_the_merges() -> None:
    figures = measured()
    stay, merged = plans(figures, Requirements(ONE, 100 * GB))
    even = break_even(figures, stay, merged)
    assert (even.merges, even.saving) == (1.0, pytest.approx(0.22))
    assert even.requests == pytest.approx(1 / 0.22)
    assert break_even(figures, merged, stay).requests is None


def test_one_adapter_of_many_requests_shares_its_batch_merged_or_not() -> None:
    assert decide(measured(), ONE, in_flight=8).merged == ("a",)
    assert decide(measured(unmerged=1.0), ONE, in_flight=8).merged == ()


def test_one_adapter_takes_no_more_memory_merged() -> None:
    # Unmerged 1 + 10 + 0.3 GB, merged 1 + 10.
    plan = decide(measured(), ONE, memory=11.1 * GB)
    assert (plan.merged, plan.fits) == (("a",), True)
    assert decide(measured(), ONE, memory=11.1 * GB, requests_per_change=1).merged == ("a",)


def test_of_equal_costs_the_plan_that_merges_least_wins() -> None:
    equal = {"a": 0.5, "b": 0.5}
    same = measured(unmerged=1.0, shared=1.0)
    assert len({plan.cost for plan in plans(same, Requirements(equal, 100 * GB))}) == 1
    assert decide(same, equal).merged == ()
    assert decide(same, equal, margin=0.0).merged == ()
    # An adapter that no request is for is not worth a merge.
    assert decide(measured(), {"a": 1.0, "b": 0.0}).merged == ("a",)


def test_a_plan_as_cheap_as_the_margin_allows_counts_as_equal() -> None:
    candidates = [ServingPlan((), ("a",), 1.25, 0.0, 1, True), ServingPlan(("a",), (), 1.0, 0.0, 1, True)]
    assert choose(candidates, 0.25) is candidates[0]
    assert choose(candidates, 0.2499) is candidates[1]


def test_equally_hot_adapters_keep_the_order_in_which_they_were_given() -> None:
    found = plans(measured(), Requirements({"b": 0.4, "a": 0.4, "c": 0.2}, 100 * GB))
    assert [plan.merged for plan in found] == [(), ("b",), ("b", "a"), ("b", "a", "c")]


def test_a_request_that_costs_nothing_more_unmerged_never_breaks_even() -> None:
    same = measured(unmerged=1.0)
    stay, merged = plans(same, Requirements(ONE, 100 * GB))
    assert break_even(same, stay, merged).requests is None
    free = measured(merge=0.0)
    stay, merged = plans(free, Requirements(ONE, 100 * GB))
    assert break_even(free, stay, merged).requests == 0


def test_several_in_flight_share_a_batch_only_while_unmerged() -> None:
    # A step costs the same for any number of rows: eight rows on one base take one step, on two models two.
    equal = {"a": 0.5, "b": 0.5}
    assert decide(measured(), equal, in_flight=8).merged == ()
    assert decide(measured(), equal, in_flight=1).merged == ("a", "b")


def test_merged_copies_beside_the_base_take_the_memory_of_the_adapted_layers_alone() -> None:
    figures = measured(keep=2.0)
    figures = replace(
        figures,
        first={**figures.first, "resident": 0.11},
        step={**figures.step, "resident": Speed(0.011, 0.0)},
    )
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    needs = Requirements(shares, 100 * GB, requests_per_change=100)
    none, one, both, every = plans(figures, needs)
    assert [plan.resident for plan in (none, one, both, every)] == [False, True, True, False]
    assert [plan.memory for plan in (none, one, both)] == [11.3 * GB, 19.3 * GB, 27.3 * GB]
    assert every.memory == 31 * GB
    # An adapter that is alone on the base is switched to as an unmerged one.
    assert both.request == pytest.approx(0.8 * (0.11 + 1.1) + 0.2 * (0.12 + 1.2))
    assert both.change == pytest.approx((3 * 0.01 + 2 * 2.0) / 100)
    assert every.request == pytest.approx(0.1 + 1.0)
    assert break_even(figures, none, both).merges == 4.0
    assert break_even(figures, none, every).merges == 3.0
    assert [plan.memory for plan in plans(measured(), needs)[:3]] == [11.3 * GB, 19.3 * GB, 29.3 * GB]


def test_the_hottest_is_merged_where_there_is_room_for_no_other() -> None:
    # Two merged models beside the base take 1 + 10 + 0.3 + 8 + 10 GB, three without it 1 + 3 * 10.
    figures = measured(unmerged=2.0, shared=2.0)
    plan = decide(figures, {"a": 0.9, "b": 0.05, "c": 0.05}, memory=25 * GB)
    assert (plan.merged, plan.unmerged) == (("a",), ("b", "c"))
    # 1 of runtime, 10 of base, 0.3 of adapters, 8 of original weights that the merge in place keeps.
    assert plan.memory == pytest.approx(19.3 * GB)
    # 90 % of the requests take 1.1 s, the others 2.2 s.
    assert plan.request == pytest.approx(0.9 * 1.1 + 0.1 * 2.2)


def test_memory_rules_plans_out() -> None:
    equal = {"a": 0.4, "b": 0.3, "c": 0.3}
    assert decide(measured(), equal).merged == ("a", "b", "c")
    limited = decide(measured(), equal, memory=20 * GB)
    assert (limited.merged, limited.fits) == (("a",), True)
    assert decide(measured(), equal, memory=12 * GB).merged == ()
    hopeless = decide(measured(), equal, memory=5 * GB)
    assert (hopeless.merged, hopeless.fits) == ((), False)


def test_a_slow_mixed_batch_speaks_for_merging() -> None:
    equal = {"a": 0.5, "b": 0.5}
    assert decide(measured(shared=1.2), equal, in_flight=8).merged == ()
    assert decide(measured(shared=3.0), equal, in_flight=8).merged == ("a", "b")


def test_a_speed_is_a_line_through_what_was_measured() -> None:
    speed = Speed.through({1: 0.02, 8: 0.027})
    assert (speed.fixed, speed.row) == (pytest.approx(0.019), pytest.approx(0.001))
    assert Speed.through({4: 0.5}) == Speed(0.5, 0.0)
    assert Speed.through({1: 0.1, 8: 0.05}) == Speed(pytest.approx(0.075), 0.0)
    falling = Speed.through({1: 0.001, 10: 0.1})
    assert falling.fixed == 0
    assert falling.row == pytest.approx((0.001 + 1.0) / 101)


def test_an_expected_step_counts_only_the_rows_that_come() -> None:
    speed = Speed(1.0, 0.1)
    assert speed.expected(0.0, 8) == 0
    assert speed.expected(1.0, 8) == pytest.approx(1.8)
    assert speed.expected(0.5, 2) == pytest.approx(0.75 + 0.1)
    assert math.isclose(speed.expected(0.5, 1), 0.55)
