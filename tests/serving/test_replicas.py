"""Several replicas answer as one engine: where requests go, and what happens when a replica ends."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.fake_engine import answer_token
from tests.serving.fake_replicas import FakeCluster, FakeHandle, FakeServedEngine
from veneer import errors
from veneer.errors import BindError, EngineError, UnsupportedError, VeneerError
from veneer.serving import replica as replica_module
from veneer.serving import replicated_engine, serving_errors
from veneer.serving.engine_types import EngineRequest, EngineStatus, Sampling
from veneer.serving.replica import EngineReplica
from veneer.serving.replica_router import Replica, ReplicaRouter
from veneer.serving.replica_types import ReplicaLostError, ReplicaState
from veneer.serving.replicated_engine import ReplicatedEngine
from veneer.serving.serving_errors import AdapterLoadingError, as_refusal


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicated_engine, "_LOOK", 0.02)
    monkeypatch.setattr(replicated_engine, "_PATIENCE", 0.01)


def up(*held: str) -> Replica:
    replica = Replica(FakeHandle(FakeServedEngine()))
    replica.see(ReplicaState("base", EngineStatus(alive=True, resident=held)))
    return replica


def run(replica: Replica, **counts: int) -> None:
    replica.running.update(counts)


# -- the router ------------------------------------------------------------------------------------------------


def test_a_request_goes_where_its_adapter_is() -> None:
    router = ReplicaRouter([up("a"), up("b"), up()], 8, {8: 4})
    assert router.choose("a") is router.replicas[0]
    assert router.choose("b") is router.replicas[1]
    assert router.choose("c") is router.replicas[2], "one that has none, rather than one that has another"


def test_a_hot_adapter_spills_as_soon_as_a_load_costs_less_than_the_wait() -> None:
    router = ReplicaRouter([up("a"), up("b")], 64, {8: 4})
    run(router.replicas[0], a=4)
    assert router.choose("a") is router.replicas[0]
    run(router.replicas[0], a=1)
    assert router.choose("a") is router.replicas[1]
    run(router.replicas[1], a=1)
    assert router.choose("a") is router.replicas[1], "which has it now: the fewest requests decide"


def test_the_base_goes_to_the_replica_with_the_fewest_requests() -> None:
    router = ReplicaRouter([up("a"), up("b")], 8, {8: 1})
    run(router.replicas[0], a=1)
    assert router.choose(None) is router.replicas[1]


def test_no_replica_runs_more_than_its_requests_and_slots() -> None:
    router = ReplicaRouter([up(), up()], 3, {8: 2})
    run(router.replicas[0], a=1, b=1)
    run(router.replicas[1], c=3)
    assert router.choose("a") is router.replicas[0]
    assert router.choose("d") is None
    run(router.replicas[0], b=1)
    assert router.choose("a") is None
    assert router.choose(None) is None


def test_a_wide_version_takes_several_slots_of_its_bucket() -> None:
    router = ReplicaRouter([up()], 8, {8: 2, 64: 4})
    router.needs = {"wide": (64, 3), "other": (64, 2), "small": (8, 1)}
    run(router.replicas[0], wide=1)
    assert router.choose("other") is None
    assert router.choose("small") is router.replicas[0]
    assert router.choose("wide") is router.replicas[0]


def test_while_one_waits_for_a_slot_no_other_takes_one_and_those_on_two_replicas_give_one_back() -> None:
    router = ReplicaRouter([up(), up()], 8, {8: 2})
    run(router.replicas[0], a=3, b=1)
    run(router.replicas[1], a=1, c=1)
    assert router.choose("d") is None
    assert router.choose("e", is_next=False) is None
    assert router.choose("a") is router.replicas[1]
    assert router.choose("a", is_next=False) is router.replicas[0]
    assert router.choose(None, is_next=False) is router.replicas[1]


def test_those_who_wait_get_room_in_the_order_they_came() -> None:
    async def main() -> list[str]:
        router, order = ReplicaRouter([up()], 4, {8: 1}), list[str]()

        async def one(version: str) -> None:
            async with router.place(version):
                order.append(version)
                await asyncio.sleep(0.02)

        await asyncio.gather(*(one(version) for version in "abcd"))
        assert not router.replicas[0].running
        return order

    assert asyncio.run(main()) == ["a", "b", "c", "d"]


def test_a_replica_that_is_gone_or_whose_engine_is_dead_gets_nothing() -> None:
    router = ReplicaRouter([up("a"), up()], 8, {8: 4})
    router.replicas[0].lose("gone")
    assert router.choose("a") is router.replicas[1]
    assert router.for_load("a") == [router.replicas[1]]
    router.replicas[1].see(ReplicaState("base", EngineStatus(alive=False)))
    with pytest.raises(ReplicaLostError) as caught:
        router.choose("a")
    assert (caught.value.status, caught.value.retry_after) == (503, 2)


# -- the engine ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def replicated(*engines: FakeServedEngine) -> AsyncIterator[tuple[ReplicatedEngine, list[FakeHandle]]]:
    cluster = FakeCluster(engines or [FakeServedEngine(), FakeServedEngine()])
    engine = ReplicatedEngine(cluster, requests=8, capacity={8: 4})
    await asyncio.to_thread(engine.start)
    try:
        yield engine, cluster.handles
    finally:
        await asyncio.to_thread(engine.stop, 0)
        assert cluster.stopped


def asked(number: Any, version: str | None, tokens: int = 4) -> EngineRequest:
    return EngineRequest(str(number), (5, 6, 7), version, Sampling(max_tokens=tokens))


async def answer(engine: ReplicatedEngine, request: EngineRequest) -> list[int | None]:
    return [event.token for event in [event async for event in engine.generate(request)]]


def expected(version: str | None, tokens: int = 4) -> list[int]:
    return [answer_token(version, 3, 0, index) for index in range(tokens)]


def served(handles: Sequence[FakeHandle]) -> list[int]:
    return [len(handle.engine.requests) for handle in handles]


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_versions_are_spread_and_each_is_answered_where_it_is() -> None:
    async def main() -> None:
        async with replicated() as (engine, handles):
            for version in "abcd":
                assert (await engine.load(version, Path(version))).version == version
            assert [len(handle.engine.loaded) for handle in handles] == [2, 2]
            for version in "abcd":
                assert await answer(engine, asked(version, version)) == expected(version)
            assert served(handles) == [2, 2]
            assert [handle.engine.loads for handle in handles] == [2, 2]
            assert set(engine.status().resident) == set("abcd")
            assert engine.max_context == 64

    asyncio.run(main())


def test_a_hot_version_is_loaded_where_it_spills_to() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine(delay=0.01), FakeServedEngine(delay=0.01)) as (engine, handles):
            await engine.load("a", Path("a"))
            answers = await asyncio.gather(*(answer(engine, asked(i, "a")) for i in range(12)))
            assert answers == [expected("a")] * 12
            assert [handle.engine.loads for handle in handles] == [1, 1]
            assert min(served(handles)) >= 4
            assert handles[1].engine.loaded == {"a": Path("a").resolve()}

    asyncio.run(main())


def test_a_dropped_version_leaves_all_replicas_and_one_in_use_stays() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine(delay=0.01), FakeServedEngine(delay=0.01)) as (engine, handles):
            await engine.load("a", Path("a"))
            running = [asyncio.create_task(answer(engine, asked(i, "a", 20))) for i in range(12)]
            await until(lambda: all(handle.engine.running for handle in handles))
            with pytest.raises(EngineError):
                await engine.drop("a")
            assert engine.status().resident == ("a",)
            assert await asyncio.gather(*running) == [expected("a", 20)] * 12
            await engine.drop("a")
            assert not any(handle.engine.loaded for handle in handles)
            with pytest.raises(EngineError, match="not loaded"):
                await answer(engine, asked(99, "a"))
            with pytest.raises(EngineError, match="not loaded"):
                await engine.drop("a")

    asyncio.run(main())


def test_a_version_that_nobody_knows_is_dropped() -> None:
    async def main() -> None:
        async with replicated() as (engine, handles):
            await engine.load("a", Path("a"))
            for handle in handles:
                handle.engine.loaded["stray"] = Path("stray")
            await until(lambda: not any("stray" in handle.engine.loaded for handle in handles))
            assert sum("a" in handle.engine.loaded for handle in handles) == 1

    asyncio.run(main())


def test_a_closed_answer_is_cancelled_in_its_replica() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine(delay=0.01)) as (engine, handles):
            events = engine.generate(asked(1, None, 60))
            await anext(events)
            assert handles[0].engine.running == {"1"}
            await events.aclose()
            assert not handles[0].engine.running
            waiting = asyncio.create_task(answer(engine, asked(2, None, 60)))
            await until(lambda: handles[0].engine.running)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert not handles[0].engine.running

    asyncio.run(main())


def test_the_work_of_all_replicas_is_added_up_and_never_falls() -> None:
    async def main() -> None:
        async with replicated() as (engine, handles):
            for handle in handles:
                handle.engine.meter.computed(tokens=5, adapters=1)

            def tokens() -> float:
                return engine.status().work.sizes["tokens"].total

            await until(lambda: tokens() == 10)
            assert engine.status().work.bank["writes"] == 2 * 3
            handles[0].kill()
            await until(lambda: engine.status().restarts == 1)
            assert tokens() == 10
            handles[0].come_back(FakeServedEngine())
            handles[0].engine.meter.computed(tokens=2, adapters=1)
            await until(lambda: tokens() == 12)
            assert engine.status().work.bank["writes"] == 3 * 3

    asyncio.run(main())


def test_a_replica_that_ends_loses_what_it_runs_and_nothing_else() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine(delay=0.01), FakeServedEngine(delay=0.01)) as (engine, handles):
            for version in "ab":
                await engine.load(version, Path(version))
            home = next(handle for handle in handles if "a" in handle.engine.loaded)
            lost = [asyncio.create_task(answer(engine, asked(f"a{i}", "a", 30))) for i in range(3)]
            kept = [asyncio.create_task(answer(engine, asked(f"b{i}", "b", 30))) for i in range(3)]
            await until(lambda: len(home.engine.running) == 3)
            home.kill()
            outcomes = await asyncio.gather(*lost, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [ReplicaLostError] * 3
            # The others answer its versions at once, and what ran there goes on.
            assert await answer(engine, asked("a9", "a")) == expected("a")
            assert await asyncio.gather(*kept) == [expected("b", 30)] * 3
            assert engine.status().alive
            assert engine.status().restarts == 1
            home.come_back(FakeServedEngine())
            await until(lambda: len([r for r in engine._router.replicas if r.is_up]) == 2)
            assert set(engine.status().resident) == {"a", "b"}
            await engine.load("c", Path("c"))
            assert "c" in home.engine.loaded

    asyncio.run(main())


def test_a_request_to_a_replica_that_is_gone_does_not_wait_for_the_next() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine()) as (engine, handles):
            handles[0].kill()
            with pytest.raises(ReplicaLostError):
                await answer(engine, asked(1, None))
            await until(lambda: not engine.status().alive)
            with pytest.raises(AdapterLoadingError):
                await engine.load("a", Path("a"))
            assert "a" not in engine.status().resident
            handles[0].come_back(FakeServedEngine())
            await until(lambda: engine.status().alive)
            assert await answer(engine, asked(2, None)) == expected(None)

    asyncio.run(main())


def test_a_load_goes_on_to_a_replica_that_is_there() -> None:
    async def main() -> None:
        async with replicated() as (engine, handles):
            first = engine._router.for_load("a")[0].handle
            first.kill()  # type: ignore[attr-defined]
            await engine.load("a", Path("a"))
            assert [handle.engine.loaded for handle in handles if handle is not first] == [{"a": Path("a").resolve()}]
            assert await answer(engine, asked(1, "a")) == expected("a")

    asyncio.run(main())


def test_a_drop_does_not_wait_for_a_replica_that_is_gone() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine()) as (engine, handles):
            await engine.load("a", Path("a"))
            handles[0].kill()
            await asyncio.wait_for(engine.drop("a"), 5)
            assert not engine.status().resident

    asyncio.run(main())


def test_what_cannot_be_served_is_told_and_not_kept() -> None:
    async def main() -> None:
        refusal = UnsupportedError("It is a prompt.", hint="Merge it.")
        async with replicated(FakeServedEngine(refused=refusal)) as (engine, _):
            with pytest.raises(UnsupportedError, match=r"It is a prompt\. Merge it\."):
                await engine.load("a", Path("a"))
            assert not engine.status().resident
            with pytest.raises(EngineError, match="not loaded"):
                await answer(engine, asked(1, "a"))

    asyncio.run(main())


def test_a_failure_of_the_engine_is_told_as_its_own() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine(broken=True)) as (engine, _):
            with pytest.raises(EngineError) as caught:
                await answer(engine, asked(1, None))
            assert (as_refusal(caught.value).status, caught.value.hint) == (500, "Ask again.")
            assert engine.status().alive

    asyncio.run(main())


def test_a_version_is_quarantined_everywhere_and_forgiven_where_it_was() -> None:
    async def main() -> None:
        async with replicated() as (engine, handles):
            for version in "ab":
                await engine.load(version, Path(version))
            for handle in handles:
                handle.engine.quarantined = ("a",)
            await until(lambda: engine.status().quarantined == {"a": "It failed."})
            await engine.load("a", Path("a"))
            await until(lambda: engine.status().quarantined == {})

    asyncio.run(main())


def test_replicas_of_different_bases_are_refused() -> None:
    cluster = FakeCluster([FakeServedEngine(), FakeServedEngine(digest="other")])
    with pytest.raises(EngineError, match="different files"):
        ReplicatedEngine(cluster, 8, 4).start()
    assert cluster.stopped


def test_a_replica_that_comes_back_with_another_base_answers_nothing() -> None:
    async def main() -> None:
        async with replicated(FakeServedEngine()) as (engine, handles):
            handles[0].come_back(FakeServedEngine(digest="other"))
            with pytest.raises(ReplicaLostError):
                await answer(engine, asked(1, None))
            await until(lambda: not engine.status().alive)
            assert "other files of the base" in str(engine.status().error)
            assert not handles[0].engine.requests

    asyncio.run(main())


# -- the replica -----------------------------------------------------------------------------------------------


def test_an_engine_that_stays_dead_has_its_replica_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeServedEngine()
    replica = EngineReplica(engine)
    engine.dead = True
    replica.check_health()
    monkeypatch.setattr(replica_module, "_DEAD_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="dead"):
        replica.check_health()
    engine.dead = False
    replica.check_health()


def test_an_engine_that_hangs_has_its_replica_replaced_at_once() -> None:
    engine = FakeServedEngine()
    replica = EngineReplica(engine)
    engine.hangs = True
    with pytest.raises(RuntimeError, match="dead"):
        replica.check_health()


def test_an_engine_that_does_not_start_tells_why() -> None:
    class Broken(FakeServedEngine):
        def start(self) -> None:
            raise UnsupportedError("It is an encoder-decoder.", hint="Serve another.")

    cluster = FakeCluster([Broken()])
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        ReplicatedEngine(cluster, 8, 4).start()
    assert cluster.stopped


def every_error() -> list[type[VeneerError]]:
    modules = (errors, serving_errors)
    found = [kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)]
    return [kind for kind in dict.fromkeys(found) if issubclass(kind, VeneerError)]


@pytest.mark.parametrize("kind", [*every_error(), ReplicaLostError])
def test_every_error_crosses_processes_whole(kind: type[VeneerError]) -> None:
    error = kind("It is wrong.", hint="Mend it.")
    if isinstance(error, BindError):
        error.problems = ("one", "two")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.hint, str(copy)) == ("It is wrong.", "Mend it.", str(error))
    assert copy.__dict__ == error.__dict__
