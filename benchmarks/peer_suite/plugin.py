"""A pytest plugin that runs a sample of peft's tests, and writes each outcome as a line of JSON.

The environment says how: PEER_MODULE, a module to import first (``veneer.as_peft``); PEER_ONE_IN, the share of each
function's parametrisations; PEER_OUTCOMES, the file; PEER_TESTS, a file of test ids that are run instead of a sample;
PEER_SECONDS, what a test may take.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

IRIS = ("SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm")
# A function with at most so many parametrisations is run with all of them.
FEW = 20

if os.environ.get("PEER_MODULE"):
    importlib.import_module(os.environ["PEER_MODULE"])
    import absent_names

    absent_names.install()


class OverTime(BaseException):
    """Raised in a test that takes too long."""


class AnyId(dict[str, int]):
    """Makes peft's tests take each hub id for one that is in the cache already."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def sampled(ids: list[str], one_in: int) -> set[str]:
    """Return the tests of functions with few parametrisations, and one in so many of the others', by their hashes."""
    functions: dict[str, list[str]] = defaultdict(list)
    for test in ids:
        functions[test.partition("[")[0]].append(test)
    chosen: set[str] = set()
    for tests in functions.values():
        ranked = sorted(tests, key=digest)
        chosen.update(ranked if len(tests) <= FEW else ranked[: -(-len(tests) // one_in)])
    return chosen


def digest(test: str) -> int:
    """Return a number that is the same on each machine."""
    return int.from_bytes(hashlib.sha256(test.encode()).digest()[:8], "big")


def load_dataset(name: str, *args: Any, split: str | None = None, **options: Any) -> Any:
    """Return a few rows in place of a dataset of the hub."""
    import datasets
    import numpy as np
    from PIL import Image

    words = "Be yourself; everyone else is already taken. So many books, so little time."
    rows: dict[str, dict[str, list[Any]]] = {
        "ybelkada/english_quotes_copy": {"quote": [words] * 20, "author": ["A"] * 20},
        "Abirate/english_quotes": {"quote": [words] * 20, "author": ["A"] * 20},
        "nyu-mll/glue": {"sentence": [words] * 20, "label": [0, 1] * 10, "idx": [*range(20)]},
        "huggingface/cats-image": {
            "image": [Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))]
        },
    }
    if name == "scikit-learn/iris":
        from sklearn.datasets import load_iris

        data = load_iris()
        rows[name] = {column: [*values] for column, values in zip(IRIS, data["data"].T, strict=True)}
    if name not in rows:
        raise ConnectionError(f"There is no stand-in for the dataset {name}.")
    data = datasets.Dataset.from_dict(rows[name])
    return data if split else datasets.DatasetDict(dict.fromkeys(("train", "test", "validation"), data))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the option that peft's own conftest would declare."""
    parser.addoption("--regression", action="store_true", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Declare peft's marks and put the stand-ins in their places."""
    for mark in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", mark)
    import datasets

    datasets.load_dataset = load_dataset
    signal.signal(signal.SIGALRM, _over_time)
    faulthandler.enable()


def _over_time(*args: Any) -> None:
    raise OverTime


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the sample, or the tests that a file names."""
    import tests.testing_utils as utils  # type: ignore[import-not-found]

    utils._HUB_MODEL_ACCESSES = AnyId()
    named = os.environ.get("PEER_TESTS")
    if named:
        chosen = set(Path(named).read_text().splitlines())
    else:
        chosen = sampled([item.nodeid for item in items], int(os.environ.get("PEER_ONE_IN", "1")))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a test that takes too long, and begin each from the same random state."""
    import torch

    torch.manual_seed(0)
    signal.alarm(int(os.environ.get("PEER_SECONDS", "120")))
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Write the outcome of a test's call, or of what kept it from being called."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        write(
            {"id": item.nodeid, "when": report.when, "outcome": outcome(report), "seconds": round(call.duration, 2)}
            | told(call)
        )
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write that a file cannot be collected."""
    if report.failed:
        write({"id": report.nodeid, "when": "collect", "outcome": "failed", "error": str(report.longrepr)[-600:]})


def outcome(report: Any) -> str:
    """Return passed, failed, skipped or xfailed."""
    return "xfailed" if hasattr(report, "wasxfail") else str(report.outcome)


def told(call: pytest.CallInfo[None]) -> dict[str, str]:
    """Return the error of a test, and where it was raised."""
    if call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
        return {}
    error = call.excinfo
    frames = [f"{entry.path}:{entry.lineno + 1}" for entry in error.traceback[-4:]]
    text = str(error.value).strip()
    return {"error": f"{error.typename}: {text[:600]}", "frames": " < ".join(reversed(frames))}


def write(line: dict[str, Any]) -> None:
    """Append a line to the file of outcomes."""
    target = os.environ.get("PEER_OUTCOMES")
    if target:
        with Path(target).open("a") as file:
            file.write(json.dumps(line) + "\n")
