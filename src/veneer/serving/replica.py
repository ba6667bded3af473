"""Runs an engine in a process of its own, for a server that reaches it over Ray."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TypeVar

from veneer.errors import VeneerError
from veneer.serving.engine_types import EngineRequest, LoadedVersion, ServedBase, ServedEngine, TokenEvent
from veneer.serving.replica_types import ReplicaState, RequestSource, lost

T = TypeVar("T")

# An engine starts itself anew within seconds; one that stays dead for so many is replaced with its process.
_DEAD_SECONDS = 10.0


class EngineReplica:
    """Answers for one engine. It returns refusals as values: an exception would arrive as another one.

    Args:
        engine: that it starts.
    """

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine
        self._base = _started(engine)
        self._alive_at = time.monotonic()

    def check_health(self) -> None:
        """Raise where the engine hangs or stays dead, so that this replica is replaced."""
        status, now = self._engine.status(), time.monotonic()
        if status.alive:
            self._alive_at = now
        if status.hangs or now - self._alive_at > _DEAD_SECONDS:
            why = self._base if isinstance(self._base, VeneerError) else status.error
            raise RuntimeError(f"The engine is dead: {why}")

    async def describe(self) -> ServedBase | VeneerError:
        """Return the facts of the base, or why the engine did not start."""
        return self._base

    async def look(self, strays: Sequence[str]) -> ReplicaState:
        """Return the state, and drop versions that the server does not know."""
        for version in strays:
            await self.drop(version)
        base_digest = None if isinstance(self._base, VeneerError) else self._base.digest
        return ReplicaState(base_digest, self._engine.status())

    async def load(self, version: str, folder: Path) -> LoadedVersion | VeneerError:
        """Load a version, or return why it cannot be served."""
        return await _outcome(self._engine.load(version, folder))

    async def drop(self, version: str) -> VeneerError | None:
        """Drop a version, or return why it stays; one that is not loaded is none."""
        if version not in self._engine.status().resident:
            return None
        return await _outcome(self._engine.drop(version))

    async def generate(self, request: EngineRequest, source: RequestSource) -> AsyncIterator[TokenEvent | VeneerError]:
        """Load the version where it is not, and yield what the engine generates; an error is the last."""
        try:
            await self._prepare(request, source)
            async with aclosing(self._engine.generate(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        except VeneerError as error:
            yield error

    async def _prepare(self, request: EngineRequest, source: RequestSource) -> None:
        """Load the version of a request where it is not.

        Raises:
            VeneerError: it cannot be loaded, or the base is another one.
        """
        if isinstance(self._base, VeneerError) or self._base.digest != source.base_digest:
            raise lost("The replica has other files of the base.")
        if source.folder is not None and request.version not in self._engine.status().resident:
            await self._engine.load(str(request.version), source.folder)

    def __del__(self) -> None:
        with suppress(Exception):  # whatever state it is in, the process ends
            self._engine.stop(0)


def _started(engine: ServedEngine) -> ServedBase | VeneerError:
    """Start an engine, and return the facts of its base, or why it did not start."""
    try:
        engine.start()
        return engine.served_base
    except VeneerError as error:
        return error


async def _outcome(work: Awaitable[T]) -> T | VeneerError:
    try:
        return await work
    except VeneerError as error:
        return error
