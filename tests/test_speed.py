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


SERVING = {
    "many": {"clients": 64, "registered": 1000, "one adapter": 500.0, "64 adapters": 460.0, "1000 by Zipf": 410.0},
    "loading": {
        "between tokens, 99 %": 0.040,
        "between tokens while loading, 99 %": 0.055,
        "registered to first token": 0.2,
    },
    "leaks": {"growth over 450 cycles, MB": 3.2, "left of 1,000 streams": 1.0},
}


@pytest.fixture
def serving(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of the server, with figures that it has kept."""
    monkeypatch.setattr(report.serving, "RESULTS_FILE", tmp_path / "serving.json")
    for name, figures in SERVING.items():
        report.serving.keep(report.serving.RESULTS_FILE, name, figures)
    return report.serving


def test_the_servers_figures_have_a_ratio_a_target_and_a_verdict(serving: ModuleType) -> None:
    assert serving.table(json.loads(serving.RESULTS_FILE.read_text())).splitlines()[2:] == [
        "| 64 clients, 64 adapters / one | 460 tokens/s | 500 tokens/s | 0.92 | at least 0.9 | met |",
        "| the same, 1,000 by Zipf's law / one | 410 tokens/s | 500 tokens/s | 0.82 | at least 0.85 | missed |",
        "| the same, 99th percentile | 55 ms | 40 ms | 1.38 | at most 20 ms more | met |",
        "| from the call that registers an adapter to its first token | 200 ms |  |  | at most 150 ms | missed |",
        "| memory that 450 registrations and removals add | 3.2 MB |  |  | at most 5 MB | met |",
        "| requests and slots that 1,000 streams leave behind | 1 |  |  | at most 0 | missed |",
    ]


def test_the_servers_figures_stand_on_its_page_too(report: ModuleType, serving: ModuleType) -> None:
    text = report.with_serving(report.SERVE_PAGE.read_text(encoding="utf-8"))
    made = report.section(serving, report.SERVING_HEAD)
    assert made in text
    assert "460 tokens/s" in made
    assert report.with_serving(text) == text


def test_the_page_of_the_server_says_what_was_measured(report: ModuleType) -> None:
    text = report.SERVE_PAGE.read_text(encoding="utf-8")
    assert report.with_serving(text) == text


def test_what_was_not_measured_has_no_section(report: ModuleType, serving: ModuleType) -> None:
    serving.RESULTS_FILE.unlink()
    assert not report.section(serving, "## The server")
    begin, end = report.SERVE_BEGIN, report.SERVE_END
    assert report.with_serving(f"before\n{begin}old\n{end}\nafter\n") == f"before\n{begin}{end}\nafter\n"


@pytest.mark.parametrize("script", ["bank", "kept_merged"])
def test_each_run_that_was_kept_has_a_table(report: ModuleType, script: str) -> None:
    figures = {"rows": 64, "steady, 64 adapters, bank": 0.011, "steady, one": 0.010, "kept, MB": 212.4}
    table = getattr(report, script).table({"135M bfloat16": figures, "135M float32": figures})
    assert table.count("135M") == 2
    row = {
        "bank": "| a step, 64 adapters in a bank / one adapter | 11 ms | 10 ms | 1.10 | at most 1.25 | met |",
        "kept_merged": "| memory of the copies | 212 MB |  |  |  |  |",
    }
    assert table.count(row[script]) == 2


def test_what_scripts_keep_is_in_the_report(report: ModuleType) -> None:
    text = report.TABLE.read_text(encoding="utf-8")
    for script, title in report.SCRIPTS.items():
        assert report.section(script, f"## {title}") in text


def test_the_benchmark_for_a_gpu_runs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_bench.py", "--smoke", "--only", "layer,manage", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "gpu_bench.json").read_text())["figures"]
    assert {"frozen", "peft", "veneer"} <= {figure["side"] for figure in figures}
    assert not any(figure["limit"] for figure in figures), "times of a CPU are not judged"
    assert (tmp_path / "gpu_bench.md").read_text().count("\n") > len(figures)
