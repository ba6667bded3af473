"""A run as data: to JSON and back, saved and read, compared with another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.benching import examples
from veneer.benching.bench_report import BenchReport
from veneer.benching.compare import compare
from veneer.benching.report import files
from veneer.benching.report.content import shown_plans
from veneer.errors import ConfigError, CorruptFileError, NotACheckpointError, SourceError, VeneerError


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "forward"])
def test_it_survives_json(kind: str) -> None:
    report = examples.report(examples.setup(kind=kind))
    assert BenchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def damaged(values: dict[str, Any]) -> list[tuple[Any, str]]:
    return [
        ({}, "is no report"),
        ({**values, "schema": 99}, "schema 99"),
        ({**values, "figures": [1]}, "damaged"),
        ({**values, "made": 5}, "damaged"),
        ({key: value for key, value in values.items() if key != "setup"}, "damaged"),
        ({**values, "setup": {**values["setup"], "batch": "many"}}, "damaged"),
        ({**values, "figures": [{**values["figures"][0], "samples": ["x"]}]}, "damaged"),
    ]


def test_what_is_no_report_is_refused() -> None:
    for values, words in damaged(examples.report().to_dict()):
        with pytest.raises(CorruptFileError, match=words):
            BenchReport.from_dict(values, "x.json")


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = examples.report()
    page = report.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md", "runs"]
    later = replace(report, made="2026-02-01T12:00:00+00:00")
    assert later.save(tmp_path / "out") == page
    assert files.read(tmp_path / "out").to_dict() == later.to_dict()
    assert files.read(tmp_path / "out" / "runs" / "2026-01-31T12-00-00Z.json").to_dict() == report.to_dict()


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(SourceError, match="something else"):
        examples.report().save(tmp_path)
    with pytest.raises(SourceError, match="is a file"):
        examples.report().save(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VeneerError, match=r"needs matplotlib.*pip install matplotlib \(.*pip install '\.\[bench\]'"):
        examples.report().save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="no report"):
        files.read(tmp_path)


def verdicts(old: BenchReport, new: BenchReport) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for change in compare(old, new).changes:
        found.setdefault(change.verdict, set()).add(f"{change.quantity} {change.variant}")
    return found


def test_the_same_run_twice_has_no_changes() -> None:
    assert set(verdicts(examples.report(), examples.report(jitter=(0.999, 1.003, 1.0, 0.998, 1.002)))) == {"same"}


def test_a_regression_is_found_and_nothing_else() -> None:
    found = verdicts(examples.report(), examples.report(unmerged=1.3))
    assert found["worse"] == {f"{q} {v}" for q in ("first", "decode") for v in ("unmerged", "switching")}
    assert "better" not in found
    assert verdicts(examples.report(unmerged=1.3), examples.report())["better"] == found["worse"]
    regressions = compare(examples.report(), examples.report(merge=0.2)).regressions
    assert {change.quantity for change in regressions} == {"merge", "unmerge"}


def test_a_slower_machine_is_no_regression_of_the_adapters() -> None:
    slower = examples.report(jitter=tuple(1.5 * j for j in examples.JITTER))
    found = verdicts(examples.report(), slower)
    assert {"decode merged", "decode unmerged", "first mixed"} <= found["as the base"]
    assert "decode base" in found["worse"]


def test_noise_is_no_regression() -> None:
    wild = (0.7, 1.4, 1.05, 0.8, 1.3)
    assert "worse" not in verdicts(examples.report(jitter=wild), examples.report(unmerged=1.15, jitter=wild))


def test_what_differs_between_runs_is_said() -> None:
    old, new = examples.report(), examples.report(examples.setup(dtype="float32", repeats=2))
    new = replace(new, machine=replace(new.machine, cores=8, versions={"torch": "3.0"}))
    cautions = " ".join(compare(old, new).cautions)
    for words in ("dtype was bfloat16 and is float32", "cores was 2 and is 8", "torch was 2.13.0", "fewer than 3"):
        assert words in cautions
    with pytest.raises(ConfigError, match="no figure in common"):
        compare(replace(old, figures=()), new)


def test_of_many_plans_the_telling_ones_are_shown() -> None:
    def shown(count: int) -> list[int]:
        return [index for index, _ in shown_plans(examples.report(examples.setup([f"a{i}" for i in range(count)])))]

    assert shown(8) == list(range(9))
    assert set(shown(20)) >= {0, 1, 2, 4, 8, 16, 20}
    assert len(shown(20)) < 10


def test_it_is_public() -> None:
    assert veneer.BenchReport is BenchReport
