"""Residency: loaded once, never dropped under a lease, within limits, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.serving.strict_engine import StrictEngine
from tests.serving.tiny_adapters import write_adapter
from veneer.errors import EngineError, NonFiniteError
from veneer.serving.residency import Residency, ResidencyLimits
from veneer.serving.serving_errors import (
    AdapterBusyError,
    AdapterInvalidError,
    AdapterTooLargeError,
    EngineFailedError,
    EngineRestartingError,
)
from veneer.serving.source_files import FolderSource
from veneer.serving.store import Store

COUNT = 4


class World:
    """A store with adapters, an engine, and what lies between."""

    def __init__(self, tmp_path: Path, adapters: int | None = None, cycle: float = 0.05) -> None:
        self.store = Store(tmp_path / "store")
        self.store.open()
        self.engine = StrictEngine(delay=0.01)
        self.time = 0.0
        self.residency = Residency(
            self.engine, self.store, ResidencyLimits(adapters=adapters, cycle=cycle), clock=lambda: self.time
        )
        self.digests = [
            asyncio.run(self.store.add(FolderSource(write_adapter(tmp_path / str(n), n), links=False))).adapter.digest
            for n in range(COUNT)
        ]

    async def hold(self, number: int, seconds: float = 0.0) -> None:
        digest = self.digests[number]
        async with self.residency.lease(digest):
            assert digest in self.engine.loaded
            self.engine.running[digest] += 1
            await asyncio.sleep(seconds)
            assert digest in self.engine.loaded
            self.engine.running[digest] -= 1

    def run(self, work: Callable[[], Awaitable[object]]) -> None:
        async def whole() -> None:
            await asyncio.wait_for(work(), 5)  # type: ignore[arg-type]
            await self.residency.close()

        asyncio.run(whole())
        assert not self.engine.faults
        assert all(self.residency.leases(digest) == 0 for digest in self.digests)
        assert len(self.residency) == len(self.engine.loaded)


def test_many_at_once_load_it_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run(lambda: asyncio.gather(*(world.hold(0) for _ in range(50))))
    assert world.engine.loads[world.digests[0]] == 1
    assert world.residency.is_resident(world.digests[0])
    assert set(world.residency.load_seconds(world.digests[0])) == {"room", "verify", "engine"}


def test_the_one_unused_for_longest_leaves(tmp_path: Path) -> None:
    world = World(tmp_path, adapters=2)

    async def work() -> None:
        for number in (0, 1, 0, 2):
            await world.hold(number)

    world.run(work)
    assert set(world.engine.loaded) == {world.digests[0], world.digests[2]}
    assert world.engine.most == 2


def test_bytes_are_limited_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    size = world.store.get(world.digests[0]).nbytes  # type: ignore[union-attr]
    world.engine.nbytes.update(dict.fromkeys(world.digests, size))
    world.residency = Residency(world.engine, world.store, ResidencyLimits(host_bytes=int(2.5 * size)))
    world.run(lambda: asyncio.gather(*(world.hold(number % COUNT) for number in range(20))))
    assert world.engine.most == 2
    world.residency = Residency(world.engine, world.store, ResidencyLimits(host_bytes=size - 1))
    with pytest.raises(AdapterTooLargeError, match="--host-bytes"):
        asyncio.run(world.hold(3))


def test_what_adapters_take_in_memory_counts_and_is_known_the_next_time(tmp_path: Path) -> None:
    world = World(tmp_path)
    first, second, third, large = world.digests
    world.engine.nbytes.update({first: 40_000, second: 30_000, third: 10, large: 100_001})
    world.residency = Residency(world.engine, world.store, ResidencyLimits(host_bytes=100_000))

    async def work() -> None:
        await world.hold(0)
        assert world.residency.memory(first) == world.residency.used_bytes == 40_000
        await world.hold(1)
        world.engine.folded_bytes = 29_000
        assert world.residency.used_bytes == 99_000
        world.engine.nbytes[third] = 5_000
        await world.hold(2)  # its files fit, and what it takes does not
        assert set(world.engine.loaded) == {second, third}
        with pytest.raises(AdapterTooLargeError, match=r"takes 100.*--host-bytes"):
            await world.hold(3)
        assert large not in world.engine.loaded
        world.engine.folded_bytes = 0
        await world.hold(1)
        await world.residency.drop(third)
        await world.hold(2)
        world.engine.nbytes[first] = 70_000  # known from the first time: 40,000
        await world.hold(0)
        assert set(world.engine.loaded) == {first, third}
        assert world.residency.memory(second) is None

    world.run(work)


def test_what_is_pinned_stays(tmp_path: Path) -> None:
    world = World(tmp_path, adapters=2)
    world.residency.is_pinned = lambda digest: digest == world.digests[0]

    async def work() -> None:
        for number in (0, 1, 2, 3):
            await world.hold(number)

    world.run(work)
    assert set(world.engine.loaded) == {world.digests[0], world.digests[3]}


def test_more_in_use_than_room_wait_and_all_get_their_turn(tmp_path: Path) -> None:
    world = World(tmp_path, adapters=2)
    world.run(lambda: asyncio.gather(*(world.hold(number % COUNT, 0.01) for number in range(40))))
    assert world.engine.most == 2


def test_one_that_is_always_in_use_gives_way_after_the_cycle(tmp_path: Path) -> None:
    world = World(tmp_path, adapters=1)
    ended = asyncio.Event()

    async def always() -> None:
        while not ended.is_set():
            first = asyncio.ensure_future(world.hold(0, 0.03))
            await asyncio.sleep(0.015)
            second = asyncio.ensure_future(world.hold(0, 0.03))
            await asyncio.gather(first, second)

    async def other() -> None:
        await asyncio.sleep(0.05)
        await world.hold(1)
        ended.set()

    async def clock() -> None:
        while not ended.is_set():
            world.time += 0.01
            await asyncio.sleep(0.01)

    world.run(lambda: asyncio.gather(always(), always(), other(), clock()))
    assert world.engine.most == 1


def test_a_failed_load_is_remembered_and_tried_again_later_each_time(tmp_path: Path) -> None:
    world = World(tmp_path)
    digest = world.digests[0]
    world.engine.refused[digest] = NonFiniteError("It holds NaN.")

    async def work() -> None:
        for moment, loads in ((0.0, 1), (0.9, 1), (1.1, 2), (3.0, 2), (3.2, 3), (7.1, 3), (7.3, 4)):
            world.time = moment
            with pytest.raises(AdapterInvalidError, match="NaN"):
                await world.hold(0)
            assert world.engine.loads[digest] == loads, moment
        world.engine.refused.clear()
        world.time += 10
        await world.hold(0)

    world.run(work)


def test_an_engine_that_fails_is_not_held_against_the_adapter(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.engine.refused[world.digests[0]] = EngineError("The step failed.")

    async def work() -> None:
        with pytest.raises(EngineFailedError):
            await world.hold(0)
        world.engine.refused.clear()
        world.engine.alive = False
        with pytest.raises(EngineRestartingError):
            await world.hold(0)
        world.engine.alive = True
        await world.hold(0)

    world.run(work)


def test_after_a_restart_what_the_engine_lost_is_loaded_again(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        await world.hold(0)
        world.engine.loaded.clear()
        world.engine.restarts += 1
        await world.hold(0)

    world.run(work)
    assert world.engine.loads[world.digests[0]] == 2


def test_a_quarantined_version_is_refused_until_it_is_loaded_again(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        await world.hold(0)
        world.engine.quarantined[world.digests[0]] = "It ended the engine twice."
        with pytest.raises(AdapterInvalidError, match="ended the engine"):
            await world.hold(0)
        await world.residency.reload(world.digests[0])
        await world.hold(0)

    world.run(work)


def test_dropping_waits_for_nobody_and_refuses_under_a_lease(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        async with world.residency.lease(world.digests[0]):
            with pytest.raises(AdapterBusyError):
                await world.residency.drop(world.digests[0])
        await asyncio.gather(*(world.residency.drop(world.digests[0]) for _ in range(3)))
        await world.residency.drop(world.digests[1])
        world.residency.prefetch(world.digests[2])
        await world.residency.drop(world.digests[2])

    world.run(work)
    assert not world.engine.loaded


def test_dropping_waits_for_the_step_in_which_a_request_ends(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        await world.hold(0)
        world.engine.late[world.digests[0]] = 2
        await world.residency.drop(world.digests[0])
        assert not world.engine.loaded
        assert world.residency.used_bytes == 0

    world.run(work)


def test_leases_taken_while_it_is_dropped_load_it_again(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        await world.hold(0)
        await asyncio.gather(world.residency.drop(world.digests[0]), *(world.hold(0) for _ in range(5)))

    world.run(work)


def test_one_that_is_loaded_anew_while_another_refuses_to_leave_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    drop = world.engine.drop

    async def refuse(version: str) -> None:
        if version == world.digests[0]:
            await world.residency.drop(world.digests[1])
            await world.hold(1)
            raise EngineError("A request uses it.")
        await drop(version)

    async def work() -> None:
        await world.hold(0)
        await world.hold(1)
        monkeypatch.setattr(world.engine, "drop", refuse)
        assert not await world.residency._one_dropped()
        await world.hold(1)

    world.run(work)
    assert world.engine.loads[world.digests[1]] == 2


def test_callers_that_stop_waiting_leave_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, adapters=1)

    async def work() -> None:
        async with world.residency.lease(world.digests[0]):
            tasks = [asyncio.ensure_future(world.hold(1 + number % 3)) for number in range(12)]
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.2)
        await world.hold(0)

    world.run(work)
    assert set(world.engine.loaded) == {world.digests[0]}


def test_a_prefetched_one_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path, adapters=1)

    async def work() -> None:
        world.residency.prefetch(world.digests[0])
        world.residency.prefetch("sha256:none")
        await asyncio.sleep(0.05)
        assert world.residency.is_resident(world.digests[0])
        await world.hold(0)

    world.run(work)
    assert world.engine.loads[world.digests[0]] == 1
