"""The work that an engine counts: of its steps and its bank, and added up over replicas that come and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.engine_world import CONFIGS, World, request, run, running, tokens_of
from tests.serving.fake_replicas import FakeHandle, FakeServedEngine
from veneer.serving import engine as engine_module
from veneer.serving.engine_types import EngineStatus
from veneer.serving.replica_router import Replica
from veneer.serving.replica_types import ReplicaState
from veneer.serving.work_counts import EngineWork, StepMeter


def counted(work: EngineWork) -> dict[str, int]:
    distributions = {**work.seconds, **work.sizes}
    return {name: sum(values.counts) for name, values in distributions.items()} | dict(work.bank)


@pytest.mark.parametrize("continuous", [True, False])
def test_an_engine_counts_its_steps_and_what_its_bank_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, continuous: bool
) -> None:
    world = World(tmp_path, {name: CONFIGS[name] for name in ("r3", "dora")})
    if not continuous:
        monkeypatch.setattr(engine_module, "batches_continuously", lambda model: False)
    with running() as engine:
        for name, folder in world.folders.items():
            run(engine.load(name, folder))
        before = engine.status().work
        for number in range(2):
            run(tokens_of(engine, request(number, [5, 6, 7], "r3", 4)))
        after = engine.status().work
    steps = {name: counted(after)[name] - counted(before)[name] for name in counted(after)}
    assert steps["forward"] == steps["tokens"] == steps["adapters"] == 2 * 4
    assert steps["schedule"] == steps["sample"] == (2 * 4 if continuous else 0)
    assert after.sizes["tokens"].total - before.sizes["tokens"].total == 2 * (3 + 3)
    assert after.sizes["adapters"].total - before.sizes["adapters"].total == 2 * 4
    assert after.seconds["forward"].total > before.seconds["forward"].total
    assert steps["hits"] == 2
    assert steps["writes"] == steps["row_by_row"] == 0
    assert after.bank["writes"] >= 2
    assert after.bank["bytes_written"] > 0


def test_a_value_lies_in_the_range_that_ends_with_it() -> None:
    meter = StepMeter()
    for tokens in (1, 2, 3, 5000):
        meter.computed(tokens, adapters=0)
    tokens = meter.work({}).sizes["tokens"]
    assert tokens.counts[:4] == (1, 1, 1, 0)
    assert (tokens.counts[-1], tokens.total) == (1, 5006)


def test_a_phase_that_fails_is_not_counted() -> None:
    meter = StepMeter()
    with pytest.raises(ValueError, match="no"), meter.phase("sample"):
        raise ValueError("no")
    assert counted(meter.work({}))["sample"] == 0


def test_the_work_of_a_replica_that_ends_stays_counted() -> None:
    """Prometheus would take a sum that falls for one that began anew, and count all of it again."""
    meter = StepMeter()

    def state(writes: int, restarts: int = 0) -> ReplicaState:
        return ReplicaState("base", EngineStatus(alive=True, restarts=restarts, work=meter.work({"writes": writes})))

    replica = Replica(FakeHandle(FakeServedEngine()))
    meter.computed(tokens=7, adapters=1)
    replica.see(state(2))
    replica.see(state(3, restarts=1))
    assert (replica.work.bank["writes"], replica.restarts) == (3, 1)
    replica.lose("It does not answer.")
    assert (replica.work.bank["writes"], replica.restarts) == (3, 2)
    replica.see(state(4, restarts=1))
    assert (replica.work.bank["writes"], replica.restarts) == (4, 2), "the same one, which answers again"
    meter = StepMeter()
    meter._began += 1
    replica.see(state(1))
    meter.computed(tokens=5, adapters=1)
    replica.see(state(1))
    assert (replica.work.bank["writes"], replica.restarts) == (5, 2)
    assert replica.work.sizes["tokens"].total == 12
