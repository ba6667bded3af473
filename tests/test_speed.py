"""The README's figures are those of the results that are results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report")


def test_each_readme_says_what_was_measured(report: ModuleType) -> None:
    for file, words in report.READMES.items():
        text = file.read_text(encoding="utf-8")
        assert report.with_speed(text, report.read(), words) == text
        assert f"| {words.lines[2]} |" in text


def test_the_table_holds_only_what_was_measured(report: ModuleType) -> None:
    results = {"attach 135M bfloat16": {"veneer": [{"attach 1": 0.01}, {"attach 1": 0.03}, {"attach 1": 0.02}]}}
    lines = report.speed(results, report.ENGLISH).splitlines()[2:]
    assert lines == ["| Attach the first adapter | \N{EN DASH} | 20 ms | peft has none |"]
    assert "median of 3 processes" in report.remarks(results)[0]


def test_a_verdict_has_words(report: ModuleType) -> None:
    for ours, theirs, verdict in (
        (1.0, 12.12, "12.1 times faster"),
        (1.0, 1.02, "as fast"),
        (2.0, 1.0, "2 times slower"),
    ):
        sides = {"veneer": [{"attach 1": ours}], "peft": [{"attach 1": theirs}]}
        assert verdict in report.speed({"attach 135M bfloat16": sides}, report.ENGLISH)


def test_a_failure_is_told(report: ModuleType) -> None:
    results = {"failed": {"train 1B float32, peft": "not done after 240 s"}}
    assert report.remarks(results)[-1] == "Failed: train 1B float32, peft: not done after 240 s."


def test_the_benchmark_for_a_gpu_runs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_bench.py", "--smoke", "--only", "layer,manage", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "gpu_bench.json").read_text())["figures"]
    assert {"frozen", "peft", "veneer"} <= {figure["side"] for figure in figures}
    assert not any(figure["limit"] for figure in figures), "times of a CPU are not judged"
    assert (tmp_path / "gpu_bench.md").read_text().count("\n") > len(figures)
