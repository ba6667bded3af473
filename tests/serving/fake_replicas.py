"""Replicas in this process, around engines without a model: they end and come back when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tests.serving.fake_engine import ROWS, FakeEngine
from veneer.errors import EngineError, VeneerError
from veneer.serving.engine_types import EngineRequest, LoadedVersion, ServedBase, TokenEvent
from veneer.serving.replica import EngineReplica
from veneer.serving.replica_types import ReplicaState, RequestSource, lost

T = TypeVar("T")


@dataclass
class FakeServedEngine(FakeEngine):
    """Tells of a base, too; a version that a request uses stays.

    Attributes:
        digest: of the base.
        loads: how many versions it has loaded.
        quarantined: as its status tells.
    """

    digest: str = "base"
    loads: int = 0
    quarantined: tuple[str, ...] = ()

    @property
    def served_base(self) -> ServedBase:
        """The facts of the base."""
        return ServedBase(self.max_context, ROWS, None, self.digest)

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load."""
        await asyncio.sleep(0)
        self.loads += version not in self.loaded
        self.quarantined = tuple(other for other in self.quarantined if other != version)
        return await super().load(version, folder)

    async def drop(self, version: str) -> None:
        """Drop."""
        if any(request.version == version and request.id in self.running for request in self.requests):
            raise EngineError("A request uses it.")
        await super().drop(version)

    def status(self) -> Any:
        """Return the state."""
        return replace(super().status(), quarantined=dict.fromkeys(self.quarantined, "It failed."))


class FakeHandle:
    """Reaches a replica in this process, as Ray's handle does: what is sent to one that is gone waits for another."""

    def __init__(self, engine: FakeServedEngine) -> None:
        self.engine, self.replica = engine, EngineReplica(engine)
        self.gone = False

    def kill(self) -> None:
        """End the replica."""
        self.gone = True

    def come_back(self, engine: FakeServedEngine) -> None:
        """Start another in its place."""
        self.engine, self.replica, self.gone = engine, EngineReplica(engine), False

    async def _there(self) -> EngineReplica:
        while self.gone:
            await asyncio.sleep(0.01)
        return self.replica

    def describe(self) -> ServedBase:
        """Describe."""
        return value(asyncio.run(self.replica.describe()))

    def look(self, strays: Sequence[str]) -> ReplicaState:
        """Look."""
        if self.gone:
            raise lost("It is gone.")
        return asyncio.run(self.replica.look(strays))

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load."""
        return value(await (await self._there()).load(version, folder))

    async def drop(self, version: str) -> None:
        """Drop."""
        value(await (await self._there()).drop(version))

    async def generate(self, request: EngineRequest, source: RequestSource) -> AsyncIterator[TokenEvent]:
        """Generate."""
        replica = await self._there()
        async with aclosing(replica.generate(request, source)) as events:
            async for event in events:
                if self.gone or replica is not self.replica:
                    raise lost("It is gone.")
                yield value(event)


class FakeCluster:
    """Starts replicas around engines."""

    def __init__(self, engines: Sequence[FakeServedEngine]) -> None:
        self.engines, self.handles = engines, list[FakeHandle]()
        self.stopped = False

    def start(self) -> Sequence[FakeHandle]:
        """Start."""
        self.handles = [FakeHandle(engine) for engine in self.engines]
        return self.handles

    def stop(self) -> None:
        """Stop."""
        self.stopped = True


def value(outcome: T | VeneerError) -> T:
    """Return the value, or raise the error that stands in its place."""
    if isinstance(outcome, VeneerError):
        raise outcome
    return outcome
