"""Decides which waiting request comes next: fair over tenants and adapters, within limits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from veneer.adapters.slot_table import slot_capacity
from veneer.serving.auth import Caller
from veneer.serving.fair_queue import FairQueue, Waiter
from veneer.serving.rate_limits import RateLimits
from veneer.serving.registry_types import Use
from veneer.serving.residency import Residency
from veneer.serving.serving_errors import DrainingError, OverloadedError, QueueFullError
from veneer.serving.slot_turns import SlotTurns
from veneer.serving.waiting import is_set_within

K = TypeVar("K")

# Over about so many of the last requests the time that one takes is averaged.
_LAST = 20


@dataclass(frozen=True)
class AdmissionLimits:
    """The limits of requests that run and wait.

    Attributes:
        running: the most requests in the engine.
        running_per_adapter: the same for one adapter; ``None`` for no limit.
        slots: of the engine's batch: a bucket's rank -> the number of its slots.
        queue: the most requests that wait.
        queue_per_adapter: the same for one adapter.
        queue_age: the seconds after which a waiting request is refused.
        cycle: the seconds that an adapter waits for a slot before another has to give one up.
        load_wait: the seconds that a request waits for its adapter to be loaded.
    """

    running: int = 64
    running_per_adapter: int | None = None
    slots: Mapping[int, int] = field(default_factory=lambda: slot_capacity(32, (8, 16, 64)))
    queue: int = 1024
    queue_per_adapter: int = 256
    queue_age: float = 30.0
    cycle: float = 2.0
    load_wait: float = 10.0


@dataclass
class Admitted:
    """A request that may go to the engine.

    Attributes:
        use: the version that it uses.
        queue_seconds: how long it waited.
        load_seconds: how much of that for its adapter.
        tokens: those of prompt and answer that count against the key and its tenant: as many as were expected, until
            the caller sets how many it used.
    """

    use: Use
    queue_seconds: float = 0.0
    load_seconds: float = 0.0
    tokens: int = 0


class Admission:
    """Queues requests, and lets them to the engine in turn. Its methods are called from the event loop's thread.

    Attributes:
        hits: ``host`` and ``store`` -> the requests that found their adapter loaded, and those for which it had to be.
    """

    def __init__(
        self,
        residency: Residency,
        limits: AdmissionLimits | None = None,
        rates: RateLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency, self._clock = residency, clock
        self._limits, self._rates = limits or AdmissionLimits(), rates or RateLimits()
        self._queue = FairQueue()
        self._slots = SlotTurns(self._limits.slots, self._limits.cycle)
        # Requests that wait for their adapter or their turn, and those that run, by adapter and by key.
        self._waiting: Counter[str | None] = Counter()
        self._running: Counter[str | None] = Counter()
        self._running_of_key: Counter[str] = Counter()
        self.hits = Counter(host=0, store=0)
        self._seconds_of_one = 1.0
        self._draining = False
        self._idle = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def admit(self, use: Use, caller: Caller, tokens: int) -> AsyncIterator[Admitted]:
        """Wait until a request may run; its adapter is loaded and stays so as long as the block runs.

        Args:
            use: of ``Registry.use``.
            caller: whose request it is.
            tokens: those of the prompt and the most to generate.

        Raises:
            RateLimitedError, QueueFullError, OverloadedError, DrainingError: it may not.
            AdapterLoadingError, AdapterInvalidError: its adapter is not there.
        """
        self._check_room(use.digest)
        self._rates.charge(caller, tokens)
        waiter, admitted = Waiter(caller, use.digest, tokens, self._clock()), Admitted(use)
        try:
            async with AsyncExitStack() as stack:
                with self._counted(use.digest):
                    if use.digest is not None:
                        self.hits["host" if self._residency.is_resident(use.digest) else "store"] += 1
                        lease = self._residency.lease(use.digest, self._limits.load_wait)
                        version = await stack.enter_async_context(lease)
                        waiter.bucket, waiter.slots = version.bucket, version.slots
                    admitted.load_seconds = self._clock() - waiter.arrival
                    await stack.enter_async_context(self._turn(waiter))
                    admitted.queue_seconds = self._clock() - waiter.arrival
                use.check()
                admitted.tokens = tokens
                yield admitted
        finally:
            self._rates.refund(caller, tokens - admitted.tokens)
            if waiter.turn.is_set():
                self._queue.count(waiter, admitted.tokens - tokens)

    def drain(self) -> None:
        """Refuse all new requests from now on; those that wait or run go on."""
        self._draining = True

    async def drained(self, timeout: float) -> bool:
        """Wait until no request waits or runs, at most ``timeout`` seconds; tell whether that was reached."""
        self._note_idle()
        return await is_set_within(self._idle, timeout)

    @property
    def running(self) -> int:
        """The requests in the engine."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """The requests that wait."""
        return self._waiting.total()

    # -- waiting -------------------------------------------------------------------------------------------

    def _check_room(self, adapter: str | None) -> None:
        if self._draining:
            raise DrainingError("The server is about to stop.", hint="Ask another one.", retry_after=10)
        limits = self._limits
        if self.waiting >= limits.queue or self._waiting[adapter] >= limits.queue_per_adapter:
            what = "" if self.waiting >= limits.queue else " for this adapter"
            raise QueueFullError(
                f"{self._waiting[adapter] if what else self.waiting} requests wait{what}.",
                hint="Ask again later.",
                retry_after=self._expected_wait(),
            )

    def _expected_wait(self) -> float:
        """Return the seconds until the requests that wait now will have run, from how long the last ones took."""
        return max(1.0, self.waiting * self._seconds_of_one / self._limits.running)

    @contextmanager
    def _counted(self, adapter: str | None) -> Iterator[None]:
        self._waiting[adapter] += 1
        try:
            yield
        finally:
            _take_one(self._waiting, adapter)
            self._note_idle()

    @asynccontextmanager
    async def _turn(self, waiter: Waiter) -> AsyncIterator[None]:
        """Wait for a request's turn, which lasts as long as the block runs."""
        self._queue.push(waiter)
        try:
            self._dispatch()
            if not await is_set_within(waiter.turn, waiter.arrival + self._limits.queue_age - self._clock()):
                raise OverloadedError(
                    f"The request waited {self._limits.queue_age:g} s, and others are still before it.",
                    hint="Ask again later.",
                    retry_after=self._expected_wait(),
                )
            yield
        finally:
            if waiter.turn.is_set():
                self._end(waiter)
            else:
                self._queue.remove(waiter)
            self._dispatch()

    # -- running -------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Let all requests run that may, and look again later where some wait for a slot."""
        now = self._clock()
        while heads := [waiter for waiter in self._queue.heads() if self._is_within_limits(waiter)]:
            waiter = self._slots.next(heads, now) if self.running < self._limits.running else None
            if waiter is None:
                break
            self._begin(waiter, now)
        if self._slots.make_way(heads, now) and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits.cycle / 4, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._dispatch()

    def _is_within_limits(self, waiter: Waiter) -> bool:
        of_key, of_adapter = waiter.caller.running, self._limits.running_per_adapter
        return (of_key is None or self._running_of_key[waiter.caller.id] < of_key) and (
            of_adapter is None or self._running[waiter.adapter] < of_adapter
        )

    def _begin(self, waiter: Waiter, now: float) -> None:
        self._queue.remove(waiter)
        self._queue.count(waiter, waiter.tokens)
        self._running[waiter.adapter] += 1
        self._running_of_key[waiter.caller.id] += 1
        if waiter.adapter is not None:
            self._slots.begin(waiter.adapter, waiter.bucket, waiter.slots, now)
        waiter.began = now
        waiter.turn.set()

    def _end(self, waiter: Waiter) -> None:
        now = self._clock()
        _take_one(self._running, waiter.adapter)
        _take_one(self._running_of_key, waiter.caller.id)
        if waiter.adapter is not None:
            self._slots.end(waiter.adapter, now)
        self._seconds_of_one += (now - waiter.began - self._seconds_of_one) / _LAST
        self._note_idle()

    def _note_idle(self) -> None:
        if self.running or self.waiting:
            self._idle.clear()
        else:
            self._idle.set()


def _take_one(counter: Counter[K], key: K) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
