"""The harness that runs peft's own tests: what is sampled, counted and reported."""

from __future__ import annotations

import pytest

from benchmarks.peer_suite import plugin, run

REASONS = ("internals", "class", "requires_grad", "more")


def test_sample_has_each_function_and_a_share_of_large_ones() -> None:
    few = [f"tests/a.py::f[{number}]" for number in range(20)]
    many = [f"tests/a.py::g[{number}]" for number in range(170)]
    chosen = plugin.sampled(few + many, 80)
    assert chosen.issuperset(few)
    assert len(chosen.intersection(many)) == 3
    assert plugin.sampled(many[::-1] + few, 80) == chosen


def test_an_excluded_function_leaves_out_its_parametrisations() -> None:
    tests = ["tests/a.py::f[1]", "tests/a.py::f[2]", "tests/a.py::g[1]", "tests/a.py::g[2]"]
    assert run.counted(tests, ["tests/a.py::f", "tests/a.py::g[2]"]) == ["tests/a.py::g[1]"]


def test_errors_of_the_same_kind_are_one_group() -> None:
    lines = ["AttributeError: 'MLP' object has no attribute 'x'", "AttributeError: 'Conv' object has no attribute 'x'"]
    assert len({run.error_of({"error": line}) for line in lines}) == 1
    assert run.error_of({"error": "E: /tmp/abc/d: no\nmore"}) == "E: PATH no"
    assert run.error_of({}) == "no outcome"


def test_table_counts_by_file() -> None:
    tests = ["tests/a.py::f", "tests/a.py::g", "tests/b.py::f"]
    rows = run.table(tests, tests[1:], {"tests/a.py::f", "tests/a.py::g"}).splitlines()
    assert rows[2:] == [
        "| a.py | 2 | 1 | 1 | 100.0 % |",
        "| b.py | 1 | 1 | 0 | 0.0 % |",
        "| all | 3 | 2 | 1 | 50.0 % |",
    ]


def test_what_is_left_out_is_in_the_baseline_and_has_a_reason_that_is_allowed() -> None:
    pytest.importorskip("tomllib")
    passing = run.passing()
    known = {*passing, *(test.partition("[")[0] for test in passing)}
    reasons = run.excluded()
    assert {*reasons} <= known
    assert all(reason.startswith(REASONS) for reason in reasons.values())
