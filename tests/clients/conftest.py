"""Runs the libraries that import peft on Veneer, where peft is not installed: ``make clients``.

A test hands its figures to ``as_recorded``, which compares them with those of the same test with peft: ``record.py``
runs the tests in an environment with peft and writes ``recorded.json``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

RECORDED = Path(__file__).parent / "recorded.json"
RECORDING = "VENEER_RECORD_CLIENTS" in os.environ

if RECORDING:
    import peft  # noqa: F401
elif importlib.util.find_spec("peft") or not importlib.util.find_spec("trl"):
    # The main run of the tests: peft is there as the oracle, and the clients are not.
    collect_ignore_glob = ["test_*.py"]
else:
    import veneer.as_peft  # noqa: F401

from tests.clients import world  # noqa: E402 - transformers looks for peft when it is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the clients' warnings for their own business."""
    for item in items:
        if item.path.is_relative_to(RECORDED.parent):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and its tokenizer."""
    return world.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter for it."""
    return world.save_adapter(tmp_path_factory.mktemp("first"), base)


@pytest.fixture(scope="session")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter for other layers of it."""
    return world.save_adapter(tmp_path_factory.mktemp("second"), base, ("q_proj", "down_proj"), seed=2)


@pytest.fixture
def as_recorded(request: pytest.FixtureRequest) -> Callable[[Mapping[str, Any]], None]:
    """Compare a test's figures with those that it had with peft."""
    name = f"{request.node.path.stem}::{request.node.name}"

    def compare(figures: Mapping[str, Any]) -> None:
        everything = json.loads(RECORDED.read_text())
        if RECORDING:
            everything["figures"][name] = figures
            write(everything)
            return
        assert name in everything["figures"], f"not recorded yet: python -m tests.clients.record -k {request.node.name}"
        expected, here = everything["figures"][name], json.loads(json.dumps(figures))
        assert here.keys() == expected.keys()
        other = {key: (here[key], expected[key]) for key in expected if not same(here[key], expected[key])}
        assert not other, f"here, and with peft: {other}"

    return compare


def write(everything: Mapping[str, Any]) -> None:
    RECORDED.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


def same(here: Any, there: Any) -> bool:
    """Tell whether two values are equal, their numbers up to rounding."""
    if isinstance(there, dict):
        return isinstance(here, dict) and here.keys() == there.keys() and all(same(here[k], there[k]) for k in there)
    if isinstance(there, list):
        return isinstance(here, list) and len(here) == len(there) and all(map(same, here, there))
    if isinstance(there, float):
        return math.isclose(here, there, rel_tol=2e-4, abs_tol=2e-4)
    return bool(here == there)
