"""The identity run in small, and that it would notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.serving.identity_client import Answered, Asked
from tests.serving.identity_run import Sizes, many_adapters, one_name
from tests.serving.identity_verdict import Judge
from tests.serving.many_adapters import Oracle, Question, write_adapter
from tests.serving.name_history import NameHistory

PROMPT = (5, 6, 7)


def test_no_answer_is_wrong_while_adapters_come_move_and_go(tmp_path: Path) -> None:
    outcome = many_adapters(tmp_path, Sizes(adapters=60, slots=8, clients=16, requests=200, changes=40))
    assert not outcome.faults
    kinds = ("right", "left by their clients", "refused: adapter_removed", "registered", "replaced", "rolled back")
    assert all(outcome.counts[kind] for kind in kinds), outcome.counts
    assert sum(count for kind, count in outcome.counts.items() if kind.startswith("removed")) > 2, outcome.counts


def test_a_name_that_is_replaced_under_load_answers_as_one_version_and_leaves_nothing(tmp_path: Path) -> None:
    outcome = one_name(tmp_path, Sizes(adapters=1, slots=8, clients=16, requests=60, changes=16))
    assert not outcome.faults
    assert outcome.counts["replaced"] > 8
    assert outcome.counts["right"] > 30, outcome.counts


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {write_adapter(folder / str(seed), seed): folder / str(seed) for seed in range(3)}


def test_the_judge_tells_wrong_answers_from_right_ones(versions: dict[str, Path]) -> None:
    first, second, third = versions
    history, oracle = NameHistory([first], first), Oracle(versions)
    history.registered(second, 2, 3)
    history.removed(5, 6, forced=False)
    judge = Judge(oracle, {"a": history}, load_wait=10)

    def fault(at: float, digest: str, of: str, tokens: int = 8, **more: object) -> str:
        text = " ".join(f"w{token}" for token in oracle.answer(Question(of, PROMPT), tokens))
        values = {"status": 200, "text": text, "finish": "length", "generated": tokens, **more}
        answer = Answered(Asked("a", None, PROMPT, 8), at, at + 1, at, label=f"a@{digest}")
        return judge.fault(replace(answer, **values))  # type: ignore[arg-type]

    assert fault(0, first, first) == ""
    assert fault(2, first, first) == fault(2, second, second) == fault(4, second, second) == ""
    assert "not [" in fault(0, first, second)
    assert fault(0, second, second) == "not a version of that time"
    assert fault(0, third, third) == "not a version of that time"
    assert fault(0, first, first, label=f"b@{first}") == "another name"
    assert "ended by abort" in fault(0, first, first, finish="abort")
    assert "tokens, ended by length" in fault(0, first, first, tokens=5)
    assert "tokens counted" in fault(0, first, first, generated=7)
    assert fault(0, first, first, tokens=3, left=True) == ""
    assert "not [" in fault(0, first, second, tokens=3, left=True)
    gone = {"status": 410, "error": {"code": "adapter_removed"}}
    assert fault(0, first, first, **gone) == "refused"
    assert fault(5, second, second, **gone) == ""
    assert fault(5, second, second, status=500, error={"code": "engine_error"}) == "refused"
