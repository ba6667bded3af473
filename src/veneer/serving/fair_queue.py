"""Orders waiting requests so that tenants, and the adapters of each, are served the same number of tokens.

Each tenant, and each adapter of it, has a counter of the tokens that it was served; who has the lowest comes next. One
that comes back after a pause is lifted to the lowest of those that are there: it cannot save up turns.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from veneer.serving.auth import Caller

K = TypeVar("K")


@dataclass(eq=False)
class Waiter:
    """A request that waits for its turn.

    Attributes:
        caller: whose request it is.
        adapter: the version that it needs; ``None`` for the base.
        tokens: what it is expected to take.
        arrival: when it came.
        bucket, slots: the rank of the bucket that the adapter needs slots of, and how many; none for the base.
        turn: set when it may run.
        began: when that was.
    """

    caller: Caller
    adapter: str | None
    tokens: int
    arrival: float
    bucket: int = 0
    slots: int = 0
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = 0.0

    @property
    def tenant(self) -> str:
        """The tenant; a key without one is its own."""
        return self.caller.tenant or self.caller.id

    @property
    def lane(self) -> tuple[str, str]:
        """The queue within the tenant: of the adapter, and of the key where that has a limit that holds it up."""
        return self.adapter or "", self.caller.id if self.caller.running else ""


class Served(Generic[K]):
    """Counts tokens by a key; only the differences between keys mean anything."""

    def __init__(self) -> None:
        self._tokens: dict[K, float] = {}

    def of(self, key: K) -> float:
        """Return the counter of a key."""
        return self._tokens.get(key, 0.0)

    def enter(self, key: K, present: Collection[K]) -> None:
        """Lift a key that begins to wait to the lowest of those ``present``, and forget the absent below that."""
        floor = min(map(self.of, present), default=0.0)
        kept = {k: tokens for k, tokens in self._tokens.items() if k in present or (present and tokens > floor)}
        self._tokens = {**kept, key: max(kept.get(key, 0.0), floor)}

    def add(self, key: K, tokens: float) -> None:
        """Count tokens that a key was served, or with a negative number did not need."""
        if key in self._tokens:
            self._tokens[key] += tokens


class _Lanes:
    """The queues of a tenant; in each, first come is first served."""

    def __init__(self) -> None:
        self.queues: dict[tuple[str, str], deque[Waiter]] = {}
        self.served: Served[tuple[str, str]] = Served()


class FairQueue:
    """Holds the requests that wait."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Lanes] = {}
        self._served: Served[str] = Served()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, waiter: Waiter) -> None:
        """Add a request at the end of the queue of its tenant and adapter."""
        if waiter.tenant not in self._tenants:
            self._served.enter(waiter.tenant, self._tenants)
            self._tenants[waiter.tenant] = _Lanes()
        lanes = self._tenants[waiter.tenant]
        if waiter.lane not in lanes.queues:
            lanes.served.enter(waiter.lane, lanes.queues)
            lanes.queues[waiter.lane] = deque()
        lanes.queues[waiter.lane].append(waiter)
        self._length += 1

    def remove(self, waiter: Waiter) -> None:
        """Remove a request, wherever it stands."""
        lanes = self._tenants[waiter.tenant]
        queue = lanes.queues[waiter.lane]
        queue.remove(waiter)
        self._length -= 1
        if not queue:
            del lanes.queues[waiter.lane]
        if not lanes.queues:
            del self._tenants[waiter.tenant]

    def heads(self) -> Iterator[Waiter]:
        """Yield the first request of each queue, in the order in which they should be served."""
        for tenant in sorted(self._tenants, key=self._served.of):
            lanes = self._tenants[tenant]
            for lane in sorted(lanes.queues, key=lanes.served.of):
                yield lanes.queues[lane][0]

    def count(self, waiter: Waiter, tokens: int) -> None:
        """Count tokens that a request is served, or with a negative number did not need."""
        self._served.add(waiter.tenant, tokens)
        if waiter.tenant in self._tenants:
            self._tenants[waiter.tenant].served.add(waiter.lane, tokens)
