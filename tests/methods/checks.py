"""Records what the contract found of each method, for the table in ``docs/methods.md``.

``python -m tests.methods.checks`` runs the contract whole, ``python -m tests.methods.checks hra oft`` for these alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RECORD = HERE / "checks.json"
CONTRACTS = (HERE / "test_contract.py", HERE / "test_prompts.py")


class Recorder:
    """A plugin of pytest that counts the outcomes of each method under each check.

    Args:
        names: the methods to run, in lower case; all if empty.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.found: dict[str, dict[str, Counter[str]]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Keep the tests of the methods asked for."""
        items[:] = [item for item in items if method_of(item) and (not self.names or method_of(item) in self.names)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> Any:
        """Note what became of a test that has a case; its id begins with the method's name."""
        report = yield
        if report.when == "call" or not report.passed:
            checks = self.found.setdefault(method_of(item).upper(), {})
            checks.setdefault(item.originalname, Counter())[report.outcome] += 1
        return report


def method_of(item: pytest.Function) -> str:
    """The method whose case a test has; none for a test without."""
    known = item.callspec.params.get("made") if hasattr(item, "callspec") else None
    return known[0] if known else ""


def recorded() -> dict[str, dict[str, dict[str, int]]]:
    """Method -> check -> outcome -> how many cases."""
    found: dict[str, dict[str, dict[str, int]]] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    return found


def record(names: list[str]) -> int:
    """Run the contract for some methods, or for all, and write what it found."""
    recorder = Recorder([name.lower() for name in names])
    code = pytest.main(["-q", *map(str, CONTRACTS)], plugins=[recorder])
    kept: Mapping[str, Any] = recorded() if names else {}
    RECORD.write_text(json.dumps({**kept, **recorder.found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
