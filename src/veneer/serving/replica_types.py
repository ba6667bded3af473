"""Defines what the server and a replica of its engine say to each other; imports no torch and no Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from veneer.serving.engine_types import EngineRequest, EngineStatus, LoadedVersion, ServedBase, TokenEvent
from veneer.serving.serving_errors import EngineRestartingError


class ReplicaLostError(EngineRestartingError):
    """A replica ended, or cannot be reached; another takes its place."""


def lost(message: str) -> ReplicaLostError:
    """Return the error that sends clients to another replica."""
    return ReplicaLostError(message, hint="Ask again.", retry_after=2)


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas of the engine run, and where.

    Attributes:
        count: how many.
        address: of the Ray cluster; one that ends with the server when ``None``.
        cpus: that each replica reserves.
        threads: of the CPU that each uses; torch's choice when ``None``.
    """

    count: int
    address: str | None = None
    cpus: float = 1.0
    threads: int | None = None


@dataclass(frozen=True)
class ReplicaState:
    """The state of a replica at one moment.

    Attributes:
        base_digest: of the base's files there.
        status: of its engine.
    """

    base_digest: str | None
    status: EngineStatus


@dataclass(frozen=True)
class RequestSource:
    """The files that an answer is made of, wherever it is made.

    Attributes:
        base_digest: of the base's files; a replica that was started anew may have found others.
        folder: of the version in the store; ``None`` for the base.
    """

    base_digest: str | None
    folder: Path | None


class ReplicaHandle(Protocol):
    """Reaches one replica; each method may raise ``ReplicaLostError``."""

    def describe(self) -> ServedBase:
        """Return the facts of the base; raise the ``VeneerError`` for which the engine did not start."""

    def look(self, strays: Sequence[str]) -> ReplicaState:
        """Return the state within seconds, and drop versions that nobody knows any more."""

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load a version, as the engine's method does."""

    async def drop(self, version: str) -> None:
        """Drop a version, as the engine's method does; one that is not loaded is none."""

    def generate(self, request: EngineRequest, source: RequestSource) -> AsyncIterator[TokenEvent]:
        """Generate, as the engine's method does; load the version before, where it is not."""


class ReplicaCluster(Protocol):
    """Starts and ends replicas, and replaces those that end by themselves."""

    def start(self) -> Sequence[ReplicaHandle]:
        """Start all replicas, and wait until they can be reached."""

    def stop(self) -> None:
        """End them."""
