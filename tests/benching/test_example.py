"""The report in the documentation is what is made today from the figures beside it, and tells nothing of a place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from veneer.benching.bench_report import BenchReport
from veneer.benching.decide.cost_model import Requirements
from veneer.benching.decide.recommendation import recommend
from veneer.benching.report import files
from veneer.benching.report.markdown import markdown

DOCS = Path(__file__).parent.parent.parent / "docs"
EXAMPLE = DOCS / "example-report"


@pytest.fixture(scope="module")
def example() -> BenchReport:
    """The run in the documentation."""
    return files.read(EXAMPLE)


def test_the_pages_are_made_from_the_figures(example: BenchReport) -> None:
    pytest.importorskip("matplotlib")
    from veneer.benching.report.html import html

    # After a change of the report: files.write(files.read(EXAMPLE), EXAMPLE), and tools/picture_report.py.
    assert (EXAMPLE / files.HTML).read_text(encoding="utf-8") == html(example)
    assert (EXAMPLE / files.MARKDOWN).read_text(encoding="utf-8") == markdown(example)


def test_the_recommendation_follows_from_the_figures(example: BenchReport) -> None:
    said = example.recommendation
    needs = Requirements(said.traffic, said.memory, said.requests_per_change or float("inf"), said.in_flight)
    assert recommend(example.setup, example.figures, example.fidelity, needs) == said


def test_it_tells_no_place(example: BenchReport) -> None:
    assert example.machine.cpu
    for file in (EXAMPLE / name for name in (files.HTML, files.MARKDOWN, files.JSON)):
        assert not re.search(r"/(home|root|tmp|work|mnt|Users)\b|localhost|https?://(?!www\.w3\.org)", file.read_text())
