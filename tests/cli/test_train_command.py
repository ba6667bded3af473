"""``veneer train`` where TRL is not installed, and before it is needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "trl" else find(name, *more))


def test_without_trl(run: Run, made: Path, tmp_path: Path, without_trl: None) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "w5"}\n')
    result = run("train", tmp_path / "data.jsonl", "--base", made / "base", "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("checking the data\nerror: Training needs trl")
    assert "pip install trl" in result.err
    assert "'.[train]'" in result.err
    assert not (tmp_path / "out").exists()


def test_the_data_come_first(run: Run, tmp_path: Path, without_trl: None) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "w5"}\n{"question": "w5"}\n')
    result = run("train", tmp_path / "data.jsonl", "--base", "nowhere", "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert f"error: {tmp_path / 'data.jsonl'}:2: keys 'question'" in result.err
