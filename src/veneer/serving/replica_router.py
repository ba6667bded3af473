"""Chooses the replica that answers a request: one that has the adapter, unless others are much less busy."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from veneer.serving.engine_types import EngineStatus
from veneer.serving.replica_types import ReplicaHandle, ReplicaState, lost
from veneer.serving.work_counts import EngineWork

# To load an adapter costs as much as so many requests that run already.
_LOAD_COST = 4
# Seconds after which a request that found no room looks again.
_POLL = 0.01


class Replica:
    """Holds the server's view of one replica.

    Attributes:
        handle: reaches it.
        state: what it last told of itself; ``None`` while it cannot be reached.
        error: why it could not be reached the last time.
        losses: how often it was lost.
        running: version -> the requests that it answers; those of the base under ``None``.
    """

    def __init__(self, handle: ReplicaHandle) -> None:
        self.handle = handle
        self.state: ReplicaState | None = None
        self.error: str | None = None
        self.losses = 0
        # Of the engines that were in its place before; and of the one there. In one, since several threads look at it.
        self._counted: tuple[EngineWork, int, EngineStatus] = EngineWork(), 0, EngineStatus(alive=False)
        self.running: Counter[str | None] = Counter()
        self._held: set[str] = set()

    @property
    def status(self) -> EngineStatus | None:
        """The state of its engine; ``None`` while it cannot be reached, which another thread may note at any time."""
        state = self.state
        return None if state is None else state.status

    @property
    def is_up(self) -> bool:
        """True where it takes requests."""
        status = self.status
        return status is not None and status.alive

    def see(self, state: ReplicaState) -> None:
        """Note its state."""
        self.state, self._held = state, set(state.status.resident)
        work, restarts, last = self._counted
        if state.status.work.began != last.work.began:  # another took its place, and counts from 0
            work, restarts = work + last.work, restarts + last.restarts
        self._counted = work, restarts, state.status

    @property
    def work(self) -> EngineWork:
        """The work of its engine, and of those that were in its place before."""
        earlier, _, last = self._counted
        return earlier + last.work

    @property
    def restarts(self) -> int:
        """The number of times that an engine or its process began anew here."""
        _, earlier, last = self._counted
        return self.losses + earlier + last.restarts

    def lose(self, error: str) -> None:
        """Note that it cannot be reached; what takes its place has no adapters."""
        if self.state is not None:
            self.losses += 1
        self.state, self.error, self._held = None, error, set()

    def note_held(self, version: str) -> None:
        """Note that it has a version, before its next state tells it."""
        self._held.add(version)

    def holds(self, version: str | None) -> bool:
        """Tell whether it has a version."""
        return version is None or version in self._held or self.running[version] > 0

    @property
    def held(self) -> int:
        """The number of versions that it has."""
        return len(self._held)

    @property
    def batch(self) -> list[str]:
        """The versions in its batch."""
        return [version for version, count in self.running.items() if version is not None and count]


class ReplicaRouter:
    """Places requests on replicas, each within its limits. Its methods are called from the event loop's thread.

    Args:
        replicas: all of them.
        requests: the most that one runs.
        capacity: of the batch of one: a bucket's rank -> the number of its slots.

    Attributes:
        needs: version -> the rank of its bucket, and how many of the slots there it takes.
    """

    def __init__(self, replicas: Sequence[Replica], requests: int, capacity: Mapping[int, int]) -> None:
        self.replicas, self._requests, self._capacity = replicas, requests, capacity
        self.needs: dict[str, tuple[int, int]] = {}
        # Those that found no room, in the order they came.
        self._waiting: list[object] = []

    @asynccontextmanager
    async def place(self, version: str | None) -> AsyncIterator[Replica]:
        """Choose the replica for a request, and count it there as long as the block runs.

        Raises:
            ReplicaLostError: no replica is up.
        """
        replica = await self._chosen(version)
        replica.running[version] += 1
        try:
            yield replica
        finally:
            replica.running[version] -= 1
            if not replica.running[version]:
                del replica.running[version]

    async def _chosen(self, version: str | None) -> Replica:
        ticket = object()
        self._waiting.append(ticket)
        try:
            while (replica := self.choose(version, is_next=self._waiting[0] is ticket)) is None:
                await asyncio.sleep(_POLL)
            return replica
        finally:
            self._waiting.remove(ticket)

    def choose(self, version: str | None, *, is_next: bool = True) -> Replica | None:
        """Return the replica for a request; ``None`` where none has room.

        Args:
            version: that it asks for.
            is_next: no other request waits for room. Where one does, a version that runs stays on one replica:
                so those that run on several give slots back.

        Raises:
            ReplicaLostError: no replica is up.
        """
        up = [replica for replica in self.replicas if replica.is_up]
        if not up:
            raise lost("No replica of the engine is up.")
        if not is_next and version is not None:
            home = max(up, key=lambda replica: replica.running[version])
            up = [home] if home.running[version] else []
        return min(
            (replica for replica in up if self._has_room(replica, version)),
            key=lambda replica: self._cost(replica, version),
            default=None,
        )

    def _has_room(self, replica: Replica, version: str | None) -> bool:
        has_slots = version is None or replica.running[version] > 0 or self._has_slots(replica, self._need(version))
        return has_slots and replica.running.total() < self._requests

    def _has_slots(self, replica: Replica, need: tuple[int, int]) -> bool:
        bucket, slots = need
        needs = map(self._need, replica.batch)
        used = sum(taken for rank, taken in needs if rank == bucket)
        return used + slots <= self._capacity[bucket]

    def _need(self, version: str) -> tuple[int, int]:
        """Return the slots that a version needs; one of the first bucket where it was dropped meanwhile."""
        return self.needs.get(version, (min(self._capacity), 1))

    def _cost(self, replica: Replica, version: str | None) -> tuple[int, int]:
        load = 0 if replica.holds(version) else _LOAD_COST
        return replica.running.total() + load, replica.held

    def for_load(self, version: str) -> list[Replica]:
        """Return the replicas that may load a version: those that have it first, then those with the fewest."""
        up = [replica for replica in self.replicas if replica.is_up]
        return sorted(up, key=lambda replica: (not replica.holds(version), replica.held, replica.running.total()))
