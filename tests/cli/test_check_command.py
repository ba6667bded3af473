"""``veneer check``: what it tells, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.random_adapters import saved

Run = Callable[..., Any]


def test_check(run: Run, made: Path, tmp_path: Path) -> None:
    taken = run("check", made / "adapter", "--for", "vllm")
    assert (taken.code, taken.err) == (0, "")
    assert "--max-lora-rank" in taken.out
    refused = run("check", saved(tmp_path / "dora", use_dora=True), "--json")
    assert (refused.code, refused.err) == (1, "")
    assert [problem["code"] for problem in json.loads(refused.out)["problems"]] == ["dora"]
    assert "does not serve it" in run("check", tmp_path / "dora").out


def test_bad_input(run: Run, made: Path, tmp_path: Path) -> None:
    for arguments, why in (
        ((made / "adapter", "--for", "tgi"), "'tgi' is no server"),
        ((made / "base",), "no adapter"),
        ((tmp_path / "none",), "none"),
    ):
        result = run("check", *arguments)
        assert (result.code, result.out) == (2, "")
        [line] = result.err.splitlines()
        assert why in line
