"""Answers requests by several replicas of an engine, as if they were one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from veneer.errors import EngineError
from veneer.printing import first_line
from veneer.serving.engine_types import EngineRequest, EngineStatus, LoadedVersion, ServedBase, TokenEvent
from veneer.serving.replica_router import Replica, ReplicaRouter
from veneer.serving.replica_types import ReplicaCluster, ReplicaLostError, RequestSource, lost
from veneer.serving.serving_errors import AdapterLoadingError
from veneer.serving.work_counts import EngineWork

T = TypeVar("T")

# Seconds between two looks at a replica.
_LOOK = 0.5
# Seconds that each look under way has when all is to end.
_LEAVING = 2.0
# Seconds after which one who waits for a replica asks whether it is there.
_PATIENCE = 0.1


class ReplicatedEngine:
    """Answers by replicas; a version is loaded on one, and on others when their turn comes.

    Args:
        cluster: starts the replicas.
        requests: the most that one runs.
        capacity: of the batch of one: a bucket's rank -> the number of its slots.
    """

    def __init__(self, cluster: ReplicaCluster, requests: int, capacity: Mapping[int, int]) -> None:
        self._cluster, self._requests, self._capacity = cluster, requests, capacity
        self._router = ReplicaRouter((), requests, capacity)
        self._base: ServedBase | None = None
        # Version -> its folder in the store.
        self._folders: dict[str, Path] = {}
        self._ending = threading.Event()
        self._watches: list[threading.Thread] = []

    # -- starting and stopping -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the replicas, and watch them.

        Raises:
            VeneerError: one does not start, or their bases differ.
        """
        try:
            replicas = [Replica(handle) for handle in self._cluster.start()]
            self._base = _common_base([replica.handle.describe() for replica in replicas])
            self._router = ReplicaRouter(replicas, self._requests, self._capacity)
            for replica in replicas:
                self._look(replica)
        except BaseException:
            self._cluster.stop()
            raise
        self._watches = [threading.Thread(target=self._watch, args=(replica,), daemon=True) for replica in replicas]
        for watch in self._watches:
            watch.start()

    def stop(self, timeout: float) -> None:
        """End the replicas, and what runs there."""
        self._ending.set()
        for watch in self._watches:
            watch.join(_LEAVING)
        self._cluster.stop()

    def _watch(self, replica: Replica) -> None:
        while not self._ending.wait(_LOOK):
            self._look(replica)

    def _look(self, replica: Replica) -> None:
        """Note the state of a replica; one that has another base is as good as lost."""
        status = replica.status
        known = () if status is None else status.resident
        try:
            state = replica.handle.look([version for version in known if version not in self._folders])
        except Exception as error:  # whatever it is, this replica is not there, and the thread goes on to look
            replica.lose(f"{type(error).__name__}: {first_line(error)}")
            return
        if state.status.alive and state.base_digest != self.served_base.digest:
            replica.lose("It has other files of the base.")
        else:
            replica.see(state)

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def served_base(self) -> ServedBase:
        """The facts of the base."""
        if self._base is None:
            raise EngineError("The engine is not started.", hint="Call its start().")
        return self._base

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.served_base.max_context

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """Generate; closing the iterator cancels the request and frees all that it held.

        Raises:
            EngineError: the version is not loaded, the prompt is too long for the cache, or a step failed.
            ReplicaLostError: the replica ended meanwhile. Nobody else is asked: the request may have been the reason.
        """
        version = request.version
        if version is not None and version not in self._folders:
            raise EngineError(f"The adapter's version {version} is not loaded.", hint="Load it first.")
        async with self._router.place(version) as replica:
            source = RequestSource(self.served_base.digest, None if version is None else self._folders[version])
            try:
                async with aclosing(replica.handle.generate(request, source)) as events:  # type: ignore[type-var]
                    yield await _while_there(anext(events), replica)
                    if version is not None:
                        replica.note_held(version)
                    async for event in events:
                        yield event
            except ReplicaLostError as error:
                replica.lose(error.message)
                raise

    # -- versions ------------------------------------------------------------------------------------------

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load a version on a replica, and on each that has quarantined it.

        Raises:
            VeneerError: it cannot be served; nothing of it is kept.
        """
        self._folders[version] = folder = folder.resolve()  # known now, lest it be dropped as a stray
        try:
            return await self._loaded(version, folder)
        except BaseException:
            self._folders.pop(version, None)
            raise

    async def _loaded(self, version: str, folder: Path) -> LoadedVersion:
        loaded: LoadedVersion | None = None
        for replica in self._router.for_load(version):
            if loaded is not None and not _has_quarantined(replica, version):
                continue
            try:
                loaded = await _while_there(replica.handle.load(version, folder), replica)
                await asyncio.to_thread(self._look, replica)
            except ReplicaLostError as error:
                replica.lose(error.message)
        if loaded is not None:
            self._router.needs[version] = loaded.bucket, loaded.slots
        else:
            raise AdapterLoadingError("No replica of the engine is up to load it.", hint="Ask again.", retry_after=2)
        return loaded

    async def drop(self, version: str) -> None:
        """Free a version that no request uses, on all replicas; raise ``EngineError`` where one does."""
        if version not in self._folders:
            raise EngineError(f"The adapter's version {version} is not loaded.")
        for replica in self._router.replicas:
            if replica.is_up:
                try:
                    await _while_there(replica.handle.drop(version), replica)
                except ReplicaLostError as error:  # what is gone holds nothing
                    replica.lose(error.message)
        self._folders.pop(version, None)
        self._router.needs.pop(version, None)

    # -- state ---------------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """Return the state of all replicas together, as they were last seen; never waits."""
        replicas = self._router.replicas
        seen = [status for replica in replicas if (status := replica.status) is not None]
        quarantined = {version: why for status in seen for version, why in status.quarantined.items()}
        errors = [replica.error for replica in replicas] + [status.error for status in seen]
        return EngineStatus(
            alive=any(status.alive for status in seen),
            error=next(filter(None, errors), None),
            restarts=sum(replica.restarts for replica in replicas),
            running=sum(status.running for status in seen),
            waiting=sum(status.waiting for status in seen),
            cache_used=max((status.cache_used for status in seen), default=0.0),
            slots=sum(status.slots for status in seen),
            slots_used=sum(status.slots_used for status in seen),
            resident=tuple(self._folders),
            quarantined=quarantined,
            work=sum((replica.work for replica in replicas), EngineWork()),
            folded_bytes=max((status.folded_bytes for status in seen), default=0),
            bank_bytes=sum(status.bank_bytes for status in seen),
        )


def _common_base(bases: list[ServedBase]) -> ServedBase:
    """Return the base that all replicas have.

    Raises:
        EngineError: their files differ.
    """
    if len({base.digest for base in bases}) > 1:
        raise EngineError("The replicas have different files of the base.", hint="Copy the same to all machines.")
    return min(bases, key=lambda base: base.max_context)


def _has_quarantined(replica: Replica, version: str) -> bool:
    status = replica.status
    return status is not None and version in status.quarantined


async def _while_there(work: Awaitable[T], replica: Replica) -> T:
    """Return the result of ``work``; what is sent to a replica that is gone would wait for one in its place.

    Raises:
        ReplicaLostError: the replica is gone.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_PATIENCE)
            if replica.state is None and not task.done():
                raise lost("The replica of the engine is gone.")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
