"""Runs the tests of training where TRL is there and peft is not (``make clients``); those of its data run anywhere."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("peft") or not importlib.util.find_spec("trl"):
    collect_ignore = ["test_train.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the warnings of TRL and its libraries for their own business."""
    for item in items:
        if item.path == Path(__file__).with_name("test_train.py"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of examples, or of lines as they are."""

    def write(examples: Sequence[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [line if isinstance(line, str) else json.dumps(line) for line in examples]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
