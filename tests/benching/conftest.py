"""Folders to measure: tiny bases with two adapters each; and what a fresh process would say of loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import run
from tests.random_adapters import saved, saved_base
from veneer.benching.measure.fresh_process import Request

__all__ = ["run"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> a folder with ``base``, ``a`` and ``b``, made when it is first asked for."""
    root = tmp_path_factory.mktemp("benching")

    def made(arch: str) -> Path:
        place = root / arch
        if not place.exists():
            saved_base(place / "base", arch)
            for seed, name in enumerate(("a", "b"), 1):
                saved(place / name, arch, seed)
        return place

    return made


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Let no fresh process start; the requests for them are kept."""
    asked: list[Request] = []

    def answer(request: Request) -> dict[str, float]:
        asked.append(request)
        found = {"import": 1.0, "load": 0.2, "peak": 4e8, "serving": 4e8}
        return found | ({"attach": 0.01} if request.variant == "unmerged" else {})

    monkeypatch.setattr("veneer.benching.run.in_fresh_process", answer)
    return asked
