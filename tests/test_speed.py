"""The README's figures are those of the results that are results."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def test_the_readme_says_what_was_measured(report: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert report.with_speed(text, report.read()) == text
    assert "| Switch the active adapter |" in text


def test_the_table_holds_only_what_was_measured(report: ModuleType) -> None:
    results = {"attach 135M bfloat16": {"veneer": [{"attach 1": 0.01}, {"attach 1": 0.03}, {"attach 1": 0.02}]}}
    assert report.speed(results).splitlines()[2:] == ["| Attach the first adapter |  | 20.0 ms |  |"]
    assert "median of 3 processes" in report.remarks(results)[0]


def test_a_failure_is_told(report: ModuleType) -> None:
    results = {"failed": {"train 1B float32, peft": "not done after 240 s"}}
    assert report.remarks(results)[-1] == "Failed: train 1B float32, peft: not done after 240 s."
