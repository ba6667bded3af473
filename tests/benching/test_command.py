"""``veneer bench``: what it prints and writes, and one line for bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benching import examples
from tests.cli.test_bad_input import refused
from veneer.benching.measure.fresh_process import Request

Run = Callable[..., Any]
SHORT = ("--batch", "1,2", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "2")


@pytest.fixture
def here(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``base``, ``a`` and ``b``."""
    shutil.copytree(folder("llama"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_prints_and_writes(run: Run, here: Path, no_processes: list[Request]) -> None:
    pytest.importorskip("matplotlib")
    options = ("--traffic", "a=20,b=80", "--memory", "16GB", "--change-every", "1000", "--in-flight", "4")
    result = run("bench", "a", "--base", "base", "--adapters", "b", *SHORT, *options)
    assert (result.code, result.err) == (0, "")
    shown = " ".join(result.out.split())
    for text in ("recommendation", "Decoding", "mixed batch", "Merged against unmerged", "Assumed: traffic b 80 %"):
        assert text in shown
    assert "The report is report/report.html" in shown
    assert sorted(path.name for path in (here / "report").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "runs",
    ]


def test_json_is_the_report(run: Run, here: Path, no_processes: list[Request]) -> None:
    pytest.importorskip("matplotlib")
    result = run("bench", "base", "--adapters", "a", "b", *SHORT, "--out", "out", "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert values == json.loads((here / "out" / "report.json").read_text())
    assert (values["setup"]["base"], [a["name"] for a in values["setup"]["adapters"]]) == ("base", ["a", "b"])


def test_runs_are_compared(run: Run, here: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, factor in (("old", 1.1), ("new", 1.4)):
        examples.report(unmerged=factor).save(here / name)
    result = run("bench", "--compare", "old", "new/report.json")
    assert result.code == 0
    shown = " ".join(result.out.split())
    assert "worse" in shown
    assert "8 worse, 0 better" in shown
    values = json.loads(run("bench", "--compare", "old", "new", "--json").out)
    assert {c["variant"] for c in values["changes"] if c["verdict"] == "worse"} == {"unmerged", "switching"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to measure"),
        (["gone/gone/gone"], "does not exist"),
        (["base"], "without adapters"),
        (["a", "--base", "b"], "is an adapter, not a base"),
        (["a", "--base", "base", "--adapters", "gone/gone/gone"], "does not exist"),
        (["a", "--base", "base", "--batch", "0"], "--batch"),
        (["a", "--base", "base", "--batch", "x"], "--batch"),
        (["a", "--base", "base", "--prompt-tokens", "1000"], "Ask for at most 32"),
        (["a", "--base", "base", "--new-tokens", "1"], "--new-tokens"),
        (["a", "--base", "base", "--traffic", "a"], "--traffic"),
        (["a", "--base", "base", "--traffic", "c=1"], "none of the adapters"),
        (["a", "--base", "base", "--memory", "much"], "--memory"),
        (["a", "--base", "base", "--device", "abacus"], "abacus"),
        (["a", "--base", "base", "--dtype", "int3"], "int3"),
        (["a", "--base", "base", "--repeats", "0"], "--repeats"),
        (["a", "--base", "base", "--prompts", "gone.txt"], "gone.txt"),
        (["a", "--base", "base", "--out", "base/config.json"], "is a file"),
        (["--compare", "a"], "takes two reports"),
        (["--compare", "gone", "gone"], "does not exist"),
        (["--compare", "a", "b"], "no report"),
        (["--compare", "base/config.json", "base/config.json"], "is no report"),
    ],
)
def test_bad_input(run: Run, here: Path, no_processes: list[Request], arguments: list[str], words: str) -> None:
    pytest.importorskip("matplotlib")
    before = sorted(here.rglob("*"))
    assert words in refused(run("bench", *arguments))
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "spoil", [lambda f: f.write_bytes(f.read_bytes()[:-5]), lambda f: f.unlink(), lambda f: f.write_bytes(b"")]
)
def test_a_spoiled_adapter(run: Run, here: Path, no_processes: list[Request], spoil: Any) -> None:
    pytest.importorskip("matplotlib")
    spoil(here / "a" / "adapter_model.safetensors")
    assert "a" in refused(run("bench", "a", "--base", "base", *SHORT))
    assert not (here / "report").exists()


def test_without_matplotlib(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, no_processes: list[Request]) -> None:
    """It is asked for after the arguments are checked and before anything is measured, and not for ``--json``."""
    find = importlib.util.find_spec
    for name in ("importlib.util.find_spec", "veneer.cli.bench_command.find_spec"):
        monkeypatch.setattr(name, lambda name, *more: None if name == "matplotlib" else find(name, *more))
    assert "none of the adapters" in refused(run("bench", "a", "--base", "base", "--traffic", "c=1"))
    assert "pip install '.[bench]'" in refused(run("bench", "a", "--base", "base"))
    assert not no_processes
    result = run("bench", "a", "--base", "base", *SHORT, "--json")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in (here / "report").iterdir()) == ["report.json", "report.md", "runs"]
