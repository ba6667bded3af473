"""Admission: fair by tokens, within limits, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.serving.admission import Admission, AdmissionLimits
from veneer.serving.auth import ANONYMOUS, Caller
from veneer.serving.engine_types import LoadedVersion
from veneer.serving.fair_queue import FairQueue, Waiter
from veneer.serving.rate_limits import RateLimits
from veneer.serving.registry_types import StoredAdapter, Use
from veneer.serving.serving_errors import (
    AdapterInvalidError,
    AdapterLoadingError,
    AdapterRemovedError,
    DrainingError,
    OverloadedError,
    QueueFullError,
    RateLimitedError,
)

ONE, TWO = Caller("one", tenant="one"), Caller("two", tenant="two")


def need(adapter: str) -> tuple[int, int]:
    """The bucket and slots that an adapter needs: those of ``a1``, or of ``16x2.anything``."""
    bucket, _, slots = adapter.partition(".")[0].partition("x")
    return (int(bucket), int(slots)) if slots else (8, 1)


class OpenHouse:
    """Holds every adapter at once, but for those that it does not."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()

    def is_resident(self, digest: str) -> bool:
        return True

    @asynccontextmanager
    async def lease(self, digest: str, wait: float | None = None) -> AsyncIterator[LoadedVersion]:
        if digest == "slow":
            raise AdapterLoadingError("It is being loaded.", retry_after=1)
        if digest == "bad":
            raise AdapterInvalidError("It is damaged.")
        await asyncio.sleep(0)
        self.held[digest] += 1
        try:
            yield LoadedVersion(digest, True, 0.0, 1000, *need(digest))
        finally:
            self.held[digest] -= 1


class World:
    """An admission, and what was let through it in which order."""

    def __init__(self, rates: RateLimits | None = None, **limits: Any) -> None:
        self.house = OpenHouse()
        # Bucket -> its slots that are used now, and the most that were; and how long requests waited at most.
        self.used: Counter[int] = Counter()
        self.most_used: Counter[int] = Counter()
        self.longest = 0.0
        self.admission = Admission(self.house, AdmissionLimits(**limits), rates)  # type: ignore[arg-type]
        self.order: list[str] = []
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.distinct = 0

    async def ask(self, adapter: str, caller: Caller = ANONYMOUS, tokens: int = 10, seconds: float = 0.001) -> None:
        use = Use(adapter or "base", adapter or None, StoredAdapter(adapter, Path(), 1, "LORA", 1, None, ()))
        async with self.admission.admit(use, caller, tokens) as admitted:
            assert not adapter or self.house.held[adapter] > 0
            self.order.append(f"{caller.id}:{adapter}")
            self.longest = max(self.longest, admitted.queue_seconds)
            with self.counted(adapter, caller.id, "all"):
                await asyncio.sleep(seconds)
            assert admitted.tokens == tokens

    @contextmanager
    def counted(self, *keys: str) -> Any:
        for key in keys:
            self.now[key] += 1
            self.most[key] = max(self.most[key], self.now[key])
        self._note_slots(keys[0], 1)
        self.distinct = max(self.distinct, sum(self.now[f"a{number}"] > 0 for number in range(10)))
        try:
            yield
        finally:
            for key in keys:
                self.now[key] -= 1
            self._note_slots(keys[0], 0)

    def _note_slots(self, adapter: str, running: int) -> None:
        """Count the slots of an adapter whose first request began, or whose last one ended."""
        if adapter and self.now[adapter] == running:
            bucket, slots = need(adapter)
            self.used[bucket] += slots if running else -slots
            self.most_used[bucket] = max(self.most_used[bucket], self.used[bucket])


def run(world: World, *work: Awaitable[object]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(asyncio.gather(*work), 30)
        assert await world.admission.drained(1)

    asyncio.run(whole())
    assert world.admission.running == world.admission.waiting == len(world.admission._queue) == 0
    assert not world.admission._running_of_key
    assert len(world.admission._slots) == 0
    assert sum(world.house.held.values()) == 0


def test_limits_hold() -> None:
    world = World(running=4, running_per_adapter=2, slots={8: 3})
    keyed = Caller("k", running=1)
    work = [world.ask(f"a{number % 8}", (keyed, ANONYMOUS)[number % 2]) for number in range(80)]
    run(world, *work, *(world.ask("") for _ in range(8)))
    assert world.most["all"] == 4
    assert max(world.most[f"a{number}"] for number in range(8)) <= 2
    assert world.most["k"] == 1
    assert world.distinct <= 3
    assert len(world.order) == 88


def test_the_base_needs_no_slot() -> None:
    world = World(slots={8: 1})
    run(world, world.ask("a1", seconds=0.05), *(world.ask("", seconds=0.01) for _ in range(5)))
    assert world.most["all"] == 6


def test_a_tenant_with_many_requests_does_not_delay_another() -> None:
    world = World(running=1)
    run(world, *(world.ask("a1", ONE) for _ in range(20)), *(world.ask("a1", TWO) for _ in range(3)))
    assert [world.order.index("two:a1"), *world.order].count("two:a1") == 3
    assert max(place for place, who in enumerate(world.order) if who == "two:a1") <= 7


def test_an_adapter_with_many_requests_does_not_delay_another_of_its_tenant() -> None:
    world = World(running=1)
    run(world, *(world.ask("a1", ONE) for _ in range(20)), *(world.ask("a2", ONE) for _ in range(3)))
    assert max(place for place, who in enumerate(world.order) if who == "one:a2") <= 7


def test_tokens_count_not_requests() -> None:
    world = World(running=1)
    large = [world.ask("a1", ONE, tokens=100) for _ in range(10)]
    small = [world.ask("a1", TWO, tokens=10) for _ in range(60)]
    run(world, *large, *small)
    first = Counter(world.order[:44])
    assert abs(10 * first["two:a1"] - 100 * first["one:a1"]) <= 110  # one request of each


def test_a_tenant_that_comes_back_has_not_saved_up_turns() -> None:
    queue = FairQueue()

    def served(count: int) -> str:
        order = ""
        for _ in range(count):
            head = next(queue.heads())
            queue.remove(head)
            queue.count(head, head.tokens)
            queue.push(Waiter(head.caller, None, 10, 0.0))
            order += head.caller.id[0]
        return order

    for caller in (ONE, TWO):
        queue.push(Waiter(caller, None, 10, 0.0))
    assert served(4) == "otot"
    queue.remove(next(head for head in queue.heads() if head.caller is TWO))
    assert served(50) == "o" * 50
    queue.push(Waiter(TWO, None, 10, 0.0))
    assert served(10).count("t") <= 6


def test_more_adapters_than_slots_all_get_their_turn() -> None:
    world = World(running=8, slots={8: 2}, cycle=0.02)

    async def client(number: int) -> None:
        for _ in range(12):
            await world.ask(f"a{number}", seconds=0.005)

    run(world, *(client(number % 4) for number in range(16)))
    assert world.distinct <= 2
    quarter = world.order[: len(world.order) // 2]
    assert len(set(quarter)) == 4


def test_an_adapter_that_is_always_busy_gives_its_slot_up_after_the_cycle() -> None:
    world = World(running=8, slots={8: 1}, cycle=0.05)
    done = asyncio.Event()

    async def always() -> None:
        while not done.is_set():
            await world.ask("a1", seconds=0.01)

    async def other() -> None:
        await asyncio.sleep(0.02)
        await world.ask("a2")
        done.set()

    run(world, *(always() for _ in range(6)), other())
    assert world.distinct == 1


def test_each_bucket_has_slots_of_its_own_and_wide_adapters_take_several() -> None:
    world = World(running=20, slots={8: 2, 64: 4})
    both = [world.ask(f"8x1.{number}", seconds=0.03) for number in range(2)]
    wide = [world.ask(f"64x2.{number}", seconds=0.03) for number in range(2)]
    run(world, *both, *wide)
    assert world.most["all"] == 4, "all fit at once"
    world = World(running=20, slots={8: 2, 64: 4})
    run(world, *(world.ask(f"64x3.{number}", seconds=0.01) for number in range(2)), world.ask("64x1.small"))
    assert world.most_used == {64: 4}


def test_a_bucket_that_is_full_holds_up_no_other() -> None:
    world = World(running=20, slots={8: 1, 16: 1}, cycle=0.02)
    long = [world.ask(f"8x1.{number}", seconds=0.2) for number in range(3)]
    run(world, *long, *(world.ask(f"16x1.{number % 3}", seconds=0.002) for number in range(12)))
    assert set(world.order[-2:]) < {f"anonymous:8x1.{number}" for number in range(3)}


def test_a_wide_adapter_gets_its_slots_though_narrow_ones_keep_coming() -> None:
    world = World(running=20, slots={8: 4}, cycle=0.05)
    done = asyncio.Event()

    async def always(number: int) -> None:
        while not done.is_set():
            await world.ask(f"8x1.{number}", seconds=0.01)

    async def wide() -> None:
        await asyncio.sleep(0.03)
        await world.ask("8x4.wide")
        done.set()

    run(world, *(always(number % 8) for number in range(16)), wide())
    assert world.longest < 5


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([(8, 1), (8, 2), (8, 3), (16, 1), (16, 2), (0, 1)]),
        st.integers(0, 4),  # which of the adapters that need so much
        st.integers(0, 2),  # which tenant
        st.integers(0, 3),  # when it comes
        st.integers(1, 4),  # how long it takes
        st.booleans(),  # whether its client goes away
    ),
    max_size=60,
)


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, running=st.integers(1, 12), eight=st.integers(3, 6), sixteen=st.integers(2, 3))
def test_whatever_comes_all_get_their_turn_and_never_more_than_fits(
    requests: list[Any], running: int, eight: int, sixteen: int
) -> None:
    capacity = {0: 2, 8: eight, 16: sixteen}
    world = World(running=running, slots=capacity, cycle=0.004)
    callers = [Caller(str(number), tenant=str(number)) for number in range(3)]

    async def client(need: tuple[int, int], which: int, tenant: int, start: int, length: int, leaves: bool) -> None:
        await asyncio.sleep(start / 500)
        adapter = "{}x{}".format(*need) + f".{which}"
        asking = asyncio.ensure_future(world.ask(adapter, callers[tenant], seconds=length / 1000))
        if leaves:
            await asyncio.sleep(0.002)
            asking.cancel()
        await asyncio.gather(asking, return_exceptions=leaves)

    run(world, *(client(*request) for request in requests))
    assert len(world.order) >= sum(not leaves for *_, leaves in requests)
    assert all(world.most_used[bucket] <= slots for bucket, slots in capacity.items())
    assert world.most["all"] <= running
    assert world.longest < 10


def test_a_full_queue_is_told_with_a_time() -> None:
    world = World(running=1, queue=3, queue_per_adapter=2)

    async def work() -> None:
        tasks = [asyncio.ensure_future(world.ask("a1", seconds=0.05))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.ensure_future(world.ask("a1")) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError, match="for this adapter") as caught:
            await world.ask("a1")
        assert caught.value.retry_after is not None
        tasks.append(asyncio.ensure_future(world.ask("a2")))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError, match="3 requests wait"):
            await world.ask("a3")
        await asyncio.gather(*tasks)

    run(world, work())


def test_one_that_waits_too_long_is_refused_and_leaves_nothing() -> None:
    world = World(running=1, queue_age=0.03)

    async def work() -> None:
        task = asyncio.ensure_future(world.ask("a1", seconds=0.1))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="waited"):
            await world.ask("a2")
        await task

    run(world, work())


def test_an_adapter_that_does_not_load_keeps_nothing() -> None:
    world = World()

    async def work() -> None:
        for adapter, kind in (("slow", AdapterLoadingError), ("bad", AdapterInvalidError)):
            with pytest.raises(kind):
                await world.ask(adapter)

    run(world, work())


def test_requests_that_are_cancelled_at_each_phase_leave_nothing() -> None:
    world = World(running=2, slots={8: 1})

    async def work() -> None:
        tasks = [asyncio.ensure_future(world.ask(f"a{number % 3}", seconds=0.02)) for number in range(30)]
        for number, task in enumerate(tasks):
            if number % 3 != 1:
                await asyncio.sleep(0.001 * (number % 4))
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.ask("a9")

    run(world, work())


def test_draining_refuses_the_new_and_lets_the_old_go_on() -> None:
    world = World(running=1)

    async def work() -> None:
        tasks = [asyncio.ensure_future(world.ask("a1", seconds=0.02)) for _ in range(3)]
        await asyncio.sleep(0.005)
        world.admission.drain()
        with pytest.raises(DrainingError):
            await world.ask("a1")
        assert not await world.admission.drained(0.001)
        assert await world.admission.drained(1)
        await asyncio.gather(*tasks)
        assert len(world.order) == 3

    run(world, work())


def test_one_whose_adapter_was_removed_by_force_while_it_waited_is_not_admitted() -> None:
    world = World()
    use = Use("a", None, None)
    use.revoked.set()

    async def work() -> None:
        with pytest.raises(AdapterRemovedError):
            async with world.admission.admit(use, ANONYMOUS, 1):
                pass

    run(world, work())


def test_rates_are_kept_and_unused_tokens_come_back() -> None:
    time = [0.0]
    rates = RateLimits(lambda: time[0])
    caller = Caller("k", requests_per_minute=3, tokens_per_minute=100)
    for _ in range(3):
        rates.charge(caller, 10)
    with pytest.raises(RateLimitedError, match="3 requests") as caught:
        rates.charge(caller, 10)
    assert caught.value.retry_after == pytest.approx(20)
    time[0] = 20.0
    rates.charge(caller, 100)
    time[0] = 60.0
    with pytest.raises(RateLimitedError, match="tokens"):
        rates.charge(caller, 90)
    rates.refund(caller, 90)
    rates.charge(caller, 90)
    with pytest.raises(RateLimitedError, match="takes 101 tokens"):
        rates.charge(caller, 101)
    for _ in range(1000):
        rates.charge(ANONYMOUS, 1_000_000)


def test_tokens_that_an_answer_did_not_need_come_back() -> None:
    caller = Caller("k", tokens_per_minute=100)
    world = World()

    async def work() -> None:
        for _ in range(5):
            async with world.admission.admit(Use("base", None, None), caller, 90) as admitted:
                admitted.tokens = 1

    run(world, work())


def test_a_refused_request_takes_nothing_from_the_rate() -> None:
    caller = Caller("k", tokens_per_minute=100)
    world = World()

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(AdapterInvalidError):
                await world.ask("bad", caller, tokens=100)
        await world.ask("a1", caller, tokens=100)

    run(world, work())
