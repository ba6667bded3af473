"""Decides which waiting request comes next: fair over tenants and adapters, within limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from veneer.serving.auth import Caller
from veneer.serving.registry_types import Use


@dataclass(frozen=True)
class AdmissionLimits:
    """The limits of requests that run and wait.

    Attributes:
        running: the most requests in the engine.
        running_per_adapter: the same for one adapter; ``None`` for no limit.
        slots: the most adapters in the engine's batch.
        queue: the most requests that wait.
        queue_per_adapter: the same for one adapter.
        queue_age: the seconds after which a waiting request is refused.
        cycle: the seconds that an adapter waits for a slot before another has to give one up.
        load_wait: the seconds that a request waits for its adapter to be loaded.
    """

    running: int = 64
    running_per_adapter: int | None = None
    slots: int = 32
    queue: int = 1024
    queue_per_adapter: int = 256
    queue_age: float = 30.0
    cycle: float = 2.0
    load_wait: float = 10.0


@dataclass(frozen=True)
class Admitted:
    """A request that may go to the engine.

    Attributes:
        use: the version that it uses.
        queue_seconds: how long it waited.
        load_seconds: how much of that for its adapter.
    """

    use: Use
    queue_seconds: float
    load_seconds: float


class Admission:
    """Queues requests, and lets them to the engine in turn. Its methods are called from the event loop's thread."""

    @asynccontextmanager
    async def admit(self, use: Use, caller: Caller, tokens: int) -> AsyncIterator[Admitted]:
        """Wait until a request may run; its adapter is loaded and stays so as long as the block runs.

        Args:
            use: of ``Registry.use``.
            caller: whose request it is.
            tokens: those of the prompt and the most to generate.

        Raises:
            QueueFullError, OverloadedError, AdapterLoadingError, AdapterInvalidError, DrainingError: it may not.
        """
        raise NotImplementedError
        yield

    def drain(self) -> None:
        """Refuse all new requests from now on; those that wait or run go on."""
        raise NotImplementedError

    async def drained(self, timeout: float) -> bool:
        """Wait until no request waits or runs, at most ``timeout`` seconds; tell whether that was reached."""
        raise NotImplementedError

    @property
    def running(self) -> int:
        """The requests in the engine."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """The requests that wait."""
        raise NotImplementedError
