"""Keeps in the engine the adapters that requests use, within limits; those unused for longest leave first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from veneer.errors import BindError, EngineError, VeneerError
from veneer.printing import nbytes
from veneer.serving.engine_types import Engine, LoadedVersion
from veneer.serving.failures import Failures
from veneer.serving.registry_types import OnPhase, ignore_phase
from veneer.serving.serving_errors import (
    AdapterBusyError,
    AdapterInvalidError,
    AdapterLoadingError,
    AdapterTooLargeError,
    EngineRestartingError,
    ServingError,
    as_refusal,
)
from veneer.serving.store import Store
from veneer.serving.waiting import is_set_within

T = TypeVar("T")

# An engine frees what a request held within a step of its end; it is asked again after this time.
_NEXT_TRY = 0.05
# After so many seconds a step takes too long to be waited for.
_LEAVING = 10.0


@dataclass(frozen=True)
class ResidencyLimits:
    """The limits of what is loaded in the engine.

    Attributes:
        host_bytes: the memory of all adapters together; ``None`` for no limit.
        adapters: the most adapters; ``None`` for no limit.
        cycle: the seconds that an adapter waits for room before another in use takes no new requests.
    """

    host_bytes: int | None = None
    adapters: int | None = None
    cycle: float = 2.0


@dataclass(eq=False)
class _Resident:
    """An adapter that is loaded, or on its way in or out; its bytes are an estimate until it is loaded."""

    digest: str
    nbytes: int
    since: float
    loading: asyncio.Task[LoadedVersion] | None = None
    leases: int = 0
    prefetched: bool = False
    has_room: bool = False
    # Takes no new leases; ``open`` is set when that is over, in the end because it is gone.
    closing: bool = False
    dropping: asyncio.Task[bool] | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_loaded(self) -> bool:
        return self.task.done()

    @property
    def task(self) -> asyncio.Task[LoadedVersion]:
        assert self.loading is not None
        return self.loading

    def close(self) -> None:
        self.closing = True
        self.open.clear()

    def reopen(self) -> None:
        self.closing = False
        self.open.set()


class Residency:
    """Loads adapters when they are asked for, each once at a time, and drops them when nothing holds them."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        limits: ResidencyLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_phase: OnPhase = ignore_phase,
        shown: Mapping[str, str] | None = None,
    ) -> None:
        self._on_phase = on_phase
        # Paths of this machine -> what clients read in their place.
        self._shown = dict(shown or {})
        self._engine, self._store, self._clock = engine, store, clock
        self._limits = limits or ResidencyLimits()
        self._failures = Failures(clock=clock)
        # In the order of their last use.
        self._residents: dict[str, _Resident] = {}
        # The memory of those that were loaded before, by digest.
        self._nbytes: dict[str, int] = {}
        # First come, first served.
        self._room = asyncio.Lock()
        self._released = asyncio.Event()
        self._restarts = 0
        #: Tells of a digest whether it stays loaded though nothing uses it.
        self.is_pinned: Callable[[str], bool] = lambda digest: False

    # -- what is loaded ------------------------------------------------------------------------------------

    def is_resident(self, digest: str) -> bool:
        """Tell whether an adapter is loaded."""
        resident = self._residents.get(digest)
        return resident is not None and resident.is_loaded and not resident.closing

    def leases(self, digest: str) -> int:
        """Return how many hold an adapter."""
        resident = self._residents.get(digest)
        return resident.leases if resident else 0

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Digest -> why the engine serves the adapter no more."""
        return self._engine.status().quarantined

    def failure(self, digest: str) -> ServingError | None:
        """Return why the last load of an adapter failed; ``None`` where none did since it was loaded."""
        return self._failures.last(digest)

    def load_seconds(self, digest: str) -> dict[str, float]:
        """Return how long the phases of an adapter's last load took: ``room``, ``verify``, ``engine``."""
        resident = self._residents.get(digest)
        return dict(resident.seconds) if resident else {}

    @property
    def used_bytes(self) -> int:
        """The memory of all adapters that are loaded or being loaded, and of the folded forms that the engine keeps."""
        sizes = (resident.nbytes for resident in self._residents.values() if resident.has_room)
        return sum(sizes) + self._engine.status().folded_bytes

    def memory(self, digest: str) -> int | None:
        """Return the memory that a loaded adapter takes; ``None`` where it is not loaded."""
        return self._residents[digest].nbytes if self.is_resident(digest) else None

    def __len__(self) -> int:
        return sum(resident.has_room for resident in self._residents.values())

    # -- leases --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, digest: str, wait: float | None = None) -> AsyncIterator[LoadedVersion]:
        """Load an adapter where it is not, and keep it as long as the block runs, which gets the facts of it.

        Args:
            digest: the adapter's.
            wait: the seconds to wait for it; it is loaded even if that takes longer and nobody waits any more.

        Raises:
            AdapterInvalidError: it cannot be served. AdapterTooLargeError: it is larger than all the room.
            AdapterLoadingError: it is not loaded within ``wait``.
            EngineRestartingError, EngineFailedError: the engine fails.
        """
        deadline = None if wait is None else time.monotonic() + wait
        resident = await self._held(digest, deadline)
        try:
            if not resident.is_loaded:
                await asyncio.wait({resident.task}, timeout=_left(deadline))
            if not resident.is_loaded:
                raise _still_loading(digest)
            yield resident.task.result()
        finally:
            self._release(resident)

    def prefetch(self, digest: str) -> None:
        """Begin to load an adapter that will be asked for; failures come to light then."""
        if digest not in self._residents:
            with suppress(VeneerError):
                self._begin(digest).prefetched = True

    async def reload(self, digest: str) -> None:
        """Give an adapter that the engine has quarantined another chance."""
        adapter = await self._store.verify(digest)
        if digest in self._engine.status().quarantined:
            await self._engine.load(digest, adapter.folder)
        self._failures.forget(digest)

    async def drop(self, digest: str) -> None:
        """Drop an adapter that nothing holds; one that is not loaded is none.

        Raises:
            AdapterBusyError: something holds it.
        """
        self._failures.forget(digest)
        self._nbytes.pop(digest, None)
        deadline = time.monotonic() + _LEAVING
        while (resident := self._residents.get(digest)) is not None:
            if not resident.leases and not resident.is_loaded:
                resident.prefetched = False
                await asyncio.wait([resident.task])
            elif not resident.leases and await self._drop(resident):
                return
            elif resident.leases or not self._engine.status().alive or time.monotonic() > deadline:
                raise AdapterBusyError(f"Requests use {digest[:19]}.", hint="Wait until they are done.", retry_after=1)
            else:
                await asyncio.sleep(_NEXT_TRY)

    async def close(self) -> None:
        """End the loads that go on."""
        tasks = [resident.task for resident in self._residents.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _held(self, digest: str, deadline: float | None) -> _Resident:
        while True:
            self._check_engine(digest)
            resident = self._residents.get(digest) or self._begin(digest)
            if not resident.closing:
                resident.leases += 1
                return resident
            left = _left(deadline)
            if left is None:
                await resident.open.wait()
            elif not await is_set_within(resident.open, left):
                raise _still_loading(digest)

    def _check_engine(self, digest: str) -> None:
        status = self._engine.status()
        if not status.alive:
            raise EngineRestartingError(
                "The engine is being started anew.", hint=status.error and f"It ended: {status.error}", retry_after=2
            )
        if digest in status.quarantined:
            raise AdapterInvalidError(
                f"The adapter {digest[:19]} is not served any more: {status.quarantined[digest]}",
                hint="Register another version.",
            )
        if status.restarts != self._restarts:
            self._restarts = status.restarts
            for lost in [r for r in self._residents.values() if r.is_loaded and r.digest not in status.resident]:
                self._remove(lost)

    def _release(self, resident: _Resident) -> None:
        resident.leases -= 1
        if self._residents.get(resident.digest) is resident:
            self._residents[resident.digest] = self._residents.pop(resident.digest)
        self._released.set()

    # -- loading -------------------------------------------------------------------------------------------

    def _begin(self, digest: str) -> _Resident:
        self._failures.check(digest)
        adapter = self._store.get(digest)
        size = self._nbytes.get(digest, adapter.nbytes if adapter else 0)
        self._check_size(size)
        resident = _Resident(digest, size, self._clock())
        resident.loading = asyncio.create_task(self._load(resident))
        self._residents[digest] = resident
        resident.loading.add_done_callback(_seen)
        return resident

    def _check_size(self, size: int) -> None:
        limit = self._limits.host_bytes
        if limit is not None and size > limit:
            raise AdapterTooLargeError(
                f"The adapter takes {nbytes(size)} of memory, and {nbytes(limit)} are there for all.",
                hint="Raise --host-bytes.",
            )

    async def _load(self, resident: _Resident) -> LoadedVersion:
        try:
            await self._timed(resident, "room", self._make_room(resident))
            adapter = await self._timed(resident, "verify", self._store.verify(resident.digest))
            version = await self._timed(resident, "engine", self._engine.load(resident.digest, adapter.folder))
            await self._count_memory(resident, version.nbytes)
        except BaseException as error:
            self._remove(resident)
            if not isinstance(error, VeneerError):
                raise
            refusal = self._told(error, resident.digest)
            if not isinstance(error, (EngineError, AdapterLoadingError)):
                self._failures.note(resident.digest, refusal)
            raise refusal from error
        resident.since = self._clock()
        self._failures.forget(resident.digest)
        self._store.touch(resident.digest)
        return version

    async def _count_memory(self, resident: _Resident, size: int) -> None:
        """Count what an adapter takes now that it is known, and drop others that are free where that is too much."""
        self._nbytes[resident.digest] = resident.nbytes = size
        try:
            self._check_size(size)
        except AdapterTooLargeError:
            await self._engine.drop(resident.digest)
            raise
        limit = self._limits.host_bytes
        while limit is not None and self.used_bytes > limit and await self._one_dropped():
            pass

    def _told(self, error: VeneerError, digest: str) -> ServingError:
        """Return a refusal that names the adapter and the base, where the error names their folders."""
        refusal, stored = as_refusal(error), self._store.get(digest)
        folder = str(stored.folder) if stored else digest
        message, hint = refusal.message, refusal.hint or ""
        for path, name in {f"adapter {folder}": "adapter", folder: "the adapter", **self._shown}.items():
            message, hint = message.replace(path, name), hint.replace(path, name)
        if isinstance(error, BindError):  # whose own hint is for Python
            hint = "Serve it on the base that it was trained on."
        return type(refusal)(message, hint=hint or None, retry_after=refusal.retry_after, param=refusal.param)

    async def _timed(self, resident: _Resident, phase: str, work: Awaitable[T]) -> T:
        start = self._clock()
        try:
            return await work
        finally:
            resident.seconds[phase] = self._clock() - start
            self._on_phase(phase, resident.seconds[phase])

    def _remove(self, resident: _Resident) -> None:
        """Forget an adapter that the engine does not have."""
        if self._residents.get(resident.digest) is resident:
            del self._residents[resident.digest]
        resident.has_room = False
        resident.reopen()
        self._released.set()

    # -- room ----------------------------------------------------------------------------------------------

    async def _make_room(self, resident: _Resident) -> None:
        """Wait until an adapter fits; others leave that nothing holds, those unused for longest first."""
        start = self._clock()
        closed: _Resident | None = None
        async with self._room:
            try:
                while not self._fits(resident):
                    if not resident.leases and not resident.prefetched:
                        raise AdapterLoadingError("Nobody waits for the adapter any more.")
                    self._released.clear()
                    if await self._one_dropped():
                        continue
                    if closed is None and self._clock() - start >= self._limits.cycle:
                        closed = self._close_one()
                    await is_set_within(self._released, _NEXT_TRY)
                resident.has_room = True
            finally:
                if closed is not None:
                    closed.reopen()

    def _fits(self, resident: _Resident) -> bool:
        limits = self._limits
        return (limits.host_bytes is None or self.used_bytes + resident.nbytes <= limits.host_bytes) and (
            limits.adapters is None or len(self) < limits.adapters
        )

    async def _one_dropped(self) -> bool:
        """Drop the adapter that was unused for longest; tell whether there was one."""
        for resident in list(self._residents.values()):
            if self._is_free(resident) and await self._drop(resident):
                return True
        return False

    def _is_free(self, resident: _Resident) -> bool:
        """Tell whether nothing holds a loaded adapter; one that went may be there again, loaded anew."""
        is_there = self._residents.get(resident.digest) is resident
        return is_there and resident.is_loaded and not resident.leases and not self.is_pinned(resident.digest)

    def _close_one(self) -> _Resident | None:
        """Let the adapter that is loaded for longest take no new leases, so that it runs out."""
        loaded = [r for r in self._residents.values() if r.is_loaded and not self.is_pinned(r.digest)]
        oldest = min(loaded, key=lambda resident: resident.since, default=None)
        if oldest is not None:
            oldest.close()
        return oldest

    async def _drop(self, resident: _Resident) -> bool:
        """Drop an adapter, to the end even where the caller stops waiting; tell whether the engine let it go."""
        if resident.dropping is None:
            resident.close()  # now, lest a lease be taken before the task begins
            resident.dropping = asyncio.create_task(self._dropped(resident))
        return await asyncio.shield(resident.dropping)

    async def _dropped(self, resident: _Resident) -> bool:
        try:
            await self._engine.drop(resident.digest)
        except VeneerError:
            if resident.digest in self._engine.status().resident:
                resident.reopen()
                return False
        finally:
            resident.dropping = None
        self._remove(resident)
        return True


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _still_loading(digest: str) -> AdapterLoadingError:
    return AdapterLoadingError(
        f"The adapter {digest[:19]} is still being loaded.", hint="Ask again in a moment.", retry_after=1
    )


def _seen(task: asyncio.Task[LoadedVersion]) -> None:
    """Note that a failure is known: those who wait for it get it, and there may be none."""
    if not task.cancelled():
        task.exception()
