"""``veneer combine``: what it tells, its exit codes, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import veneer
from tests.random_adapters import WEIGHTS, same_bits

Run = Callable[..., Any]


def test_combine(run: Run, made: Path, tmp_path: Path) -> None:
    pair = (f"{made / 'adapter'}=0.7", f"{made / 'set' / 'other'}=-0.3")
    options = ("--base", made / "base", "--type", "ties", "--density", "0.5", "--out")
    result = run("combine", *pair, *options, tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert list(report["adapters"].values()) == [0.7, -0.3]
    assert report["options"] == {"density": 0.5}
    weights = {made / "adapter": 0.7, made / "set" / "other": -0.3}
    veneer.combine(weights, made / "base", out=tmp_path / "call", combination_type="ties", density=0.5)
    assert same_bits(*(load_file(tmp_path / name / WEIGHTS) for name in ("out", "call")))
    shown = run("combine", *pair, *options, tmp_path / "out", "--overwrite")
    assert "combine report" in shown.out
    assert "ties, density 0.5" in shown.out


@pytest.mark.parametrize(
    ("weight", "options", "why"),
    [
        ("=much", (), "'much' is no weight"),
        ("", ("--density", "0.5"), "svd takes no density"),
        ("", ("--type", "cat", "--seed", "1"), "cat takes no seed"),
        ("", ("--type", "sum"), "Unknown combination_type 'sum'"),
        ("/none", (), "none"),
    ],
)
def test_bad_input(weight: str, options: tuple[str, ...], why: str, run: Run, made: Path, tmp_path: Path) -> None:
    result = run("combine", f"{made / 'adapter'}{weight}", "--out", tmp_path / "out", *options)
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("error: ")
    assert why in line
    assert not (tmp_path / "out").exists()


def test_one_given_twice(run: Run, made: Path, tmp_path: Path) -> None:
    result = run("combine", made / "adapter", f"{made / 'adapter'}=2", "--out", tmp_path / "out")
    assert result.code == 2
    assert "is given twice" in result.err
