"""Maps names to immutable versions of adapters; a name moves at once, and what runs keeps its version."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from veneer.errors import VeneerError, did_you_mean
from veneer.serving.adapter_names import Reference, check_name, read_reference
from veneer.serving.adapter_view import AdapterView
from veneer.serving.audit import audit
from veneer.serving.auth import Caller
from veneer.serving.failures import Failures, again
from veneer.serving.registered_name import RegisteredName
from veneer.serving.registry_database import RegistryDatabase, StoredName, StoredVersion
from veneer.serving.registry_types import AdapterInfo, OnPhase, Registration, State, Use, ignore_phase
from veneer.serving.residency import Residency
from veneer.serving.serving_errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterInvalidError,
    AdapterLoadingError,
    AdapterRemovedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotAllowedError,
    ServingError,
    SourceFailedError,
    as_refusal,
)
from veneer.serving.source_policy import SourcePolicy
from veneer.serving.store import Fetched, Store
from veneer.serving.version_keeper import VersionKeeper
from veneer.serving.waiting import within

_MOST_GONE = 4096
# Seconds in which requests that are ended leave: the engine notes it at its next step.
_ENDING = 5.0


@dataclass(frozen=True)
class RegistryOptions:
    """The choices of the operator that concern names.

    Attributes:
        load_timeout: the seconds that a source may take.
        require_digest: refuse a registration that does not say which bytes are meant, unless it is the operator's.
        versions: how many versions of a name are kept for a rollback, the current one among them.
        remembered: the seconds for which a name that went is told from one that never was.
    """

    load_timeout: float = 120.0
    require_digest: bool = False
    versions: int = 8
    remembered: float = 600.0


@dataclass(frozen=True)
class _Gone:
    """A name that went, or never came to be: until when it is remembered, and the answer to who asks for it."""

    until: float
    error: ServingError

    @property
    def was_there(self) -> bool:
        return isinstance(self.error, AdapterRemovedError)


class Registry:
    """Holds the names of all adapters. Its methods are called from the event loop's thread."""

    def __init__(
        self,
        store: Store,
        residency: Residency,
        policy: SourcePolicy | None = None,
        options: RegistryOptions | None = None,
        *,
        base_name: str,
        clock: Callable[[], float] = time.time,
        on_phase: OnPhase = ignore_phase,
    ) -> None:
        self._on_phase = on_phase
        self._store, self._residency, self._base_name, self._clock = store, residency, base_name, clock
        self._policy, self._options = policy or SourcePolicy(), options or RegistryOptions()
        self._database = RegistryDatabase(store.root)
        self._names: dict[str, RegisteredName] = {}
        self._aliases: dict[str, str] = {}
        self._leaving: list[RegisteredName] = []
        self._gone: OrderedDict[str, _Gone] = OrderedDict()
        self._failures = Failures()
        self._keeper = VersionKeeper(store, residency)

    async def open(self) -> None:
        """Read the names that an earlier process left, and tidy the store.

        Raises:
            OutputError: another server uses the store, or it cannot be written.
        """
        self._database.open()
        self._database.tidy()
        self._store.open()
        for stored in self._database.names():
            self._names[stored.name] = RegisteredName(stored)
            self._keeper.count(stored)
        self._aliases = self._database.aliases()
        for digest in self._store.digests - self._keeper.known:
            await self._store.remove(digest)
        for digest in self._keeper.pinned:
            self._residency.prefetch(digest)

    async def close(self) -> None:
        """End what runs in the background, and close the files."""
        tasks = [task for name in self._names.values() for task in name.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._keeper.settled()
        await self._residency.close()
        await self._store.close()
        self._database.close()

    # -- registering ---------------------------------------------------------------------------------------

    async def register(self, registration: Registration, caller: Caller) -> AdapterInfo:
        """Fetch, check and load an adapter, and move the name to it; the same bytes again change nothing.

        It goes on where the caller stops waiting.

        Raises:
            ServingError: it is refused, or cannot be had; the name stays where it is.
        """
        task = self._begun(registration, caller)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise AdapterRemovedError(f"The adapter {registration.name} was removed meanwhile.") from None

    def begin(self, registration: Registration, caller: Caller) -> AdapterInfo:
        """Register in the background; ``adapter()`` tells how it goes, a refusal of name or source is raised."""
        self._begun(registration, caller)
        return self._view().info(self._names[registration.name])

    def _begun(self, registration: Registration, caller: Caller) -> asyncio.Task[AdapterInfo]:
        name = check_name(registration.name)
        self._check_manages(name, caller)
        if name == self._base_name or name in self._aliases:
            raise AdapterExistsError(
                f"{name!r} is {'the base' if name == self._base_name else 'an alias'}.", hint="Take another name."
            )
        self._check_digest(registration)
        self._policy.source(registration)
        entry = self._names.setdefault(name, RegisteredName(StoredName(name, 0, 1, registration.pin, ())))
        task = asyncio.create_task(self._registered(entry, registration, caller))
        entry.tasks.add(task)
        task.add_done_callback(lambda done: self._ended(entry, done))
        return task

    def _check_digest(self, registration: Registration) -> None:
        if self._options.require_digest and registration.digest is None and not registration.trusted:
            raise InvalidRequestError(
                f"The registration of {registration.name} does not say which bytes are meant.",
                hint='Add "digest": "sha256:..." to the body of POST /v1/adapters; `veneer digest --adapter` tells it.',
                param="digest",
            )

    def _ended(self, entry: RegisteredName, task: asyncio.Task[AdapterInfo]) -> None:
        entry.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the name tells it, where nobody waits
        if not entry.tasks and not entry.stored.versions and self._names.get(entry.stored.name) is entry:
            del self._names[entry.stored.name]
            if entry.error is not None:
                self._remember(entry.stored.name, entry.error)

    async def _registered(self, entry: RegisteredName, registration: Registration, caller: Caller) -> AdapterInfo:
        async with entry.changing:
            try:
                entry.error = None
                return await self._moved_to(entry, registration, caller)
            except VeneerError as error:
                entry.error = as_refusal(error)
                audit("refused", name=entry.stored.name, by=caller.id, code=entry.error.code, error=entry.error.message)
                raise entry.error from error

    async def _moved_to(self, entry: RegisteredName, registration: Registration, caller: Caller) -> AdapterInfo:
        async with self._arrived(entry, registration) as fetched:
            digest, current = fetched.adapter.digest, entry.current
            if current is not None and current.digest != digest and not registration.replace:
                raise AdapterExistsError(
                    f"{entry.stored.name} is another version, {current.digest[:19]}.",
                    hint="Give replace=true to move the name, or take another name.",
                    param="name",
                )
            if registration.check:
                await self._loaded(digest, entry)
            entry.check_there()
            if current is None or current.digest != digest:
                self._add_version(entry, digest, fetched.label)
                audit("registered", name=entry.stored.name, digest=digest, source=fetched.label, by=caller.id)
            if registration.pin and not entry.stored.pinned:
                self._save(entry, pinned=True)
        return self._view().info(entry)

    @asynccontextmanager
    async def _arrived(self, entry: RegisteredName, registration: Registration) -> AsyncIterator[Fetched]:
        """Fetch an adapter, and keep it as long as the block runs; one that arrives later is let go then."""
        source = self._policy.source(registration)
        if not registration.trusted:
            self._failures.check(source.url)
        known = self._database.known_source(source.url)
        fetching = self._store.begin(source, registration.digest, self._keeper.claim, known)
        try:
            fetched = await self._fetched(entry, source.url, fetching)
            if fetched.known is not None and fetched.known != known:
                self._database.save_source(source.url, fetched.known)
            yield fetched
        finally:
            fetching.add_done_callback(self._release_arrived)

    async def _fetched(self, entry: RegisteredName, url: str, fetching: asyncio.Task[Fetched]) -> Fetched:
        start, limit = time.monotonic(), self._options.load_timeout
        try:
            fetched = await within(asyncio.shield(fetching), limit)
        except TimeoutError as error:
            raise SourceFailedError(
                f"{url} did not arrive within {limit:g} s.", hint="Register it again.", retry_after=limit
            ) from error
        except SourceFailedError as error:
            self._failures.note(url, error)
            raise
        self._failures.forget(url)
        entry.seconds = {"fetch": time.monotonic() - start}
        self._on_phase("fetch", entry.seconds["fetch"])
        return fetched

    def _release_arrived(self, fetching: asyncio.Task[Fetched]) -> None:
        if not fetching.cancelled() and fetching.exception() is None:
            self._keeper.release(fetching.result().adapter.digest)

    async def _loaded(self, digest: str, entry: RegisteredName) -> None:
        await self._residency.reload(digest)
        async with self._residency.lease(digest):
            entry.seconds |= self._residency.load_seconds(digest)

    def _add_version(self, entry: RegisteredName, digest: str, source: str) -> None:
        """Move a name to a new version, and let go of the oldest where there are too many."""
        stored = entry.stored
        others = [version for version in stored.versions if version.digest != digest]
        new = StoredVersion(stored.next, digest, self._clock(), source)
        kept = (*others[max(0, len(others) - self._options.versions + 1) :], new)
        self._save(entry, current=new.number, next=new.number + 1, versions=kept)
        for version in stored.versions:
            self._keeper.let_go(version.digest)

    def _save(self, entry: RegisteredName, **changes: Any) -> None:
        stored = replace(entry.stored, **changes)
        self._database.save(stored)
        self._keeper.count(stored)
        self._keeper.count(entry.stored, -1)
        entry.stored = stored

    # -- removing ------------------------------------------------------------------------------------------

    async def remove(self, name: str, caller: Caller, *, drain: float | None = None, force: bool = False) -> bool:
        """Remove a name, its history, and the bytes that no other name has.

        Args:
            name: the adapter's name, or an alias, which goes alone.
            caller: who asks.
            drain: wait so many seconds for the requests that use it; ``None`` refuses where there are any.
            force: after that, end them.

        Returns:
            False while requests still use it: it goes when they are done.

        Raises:
            AdapterBusyError: requests use it, and ``drain`` is ``None``.
        """
        if name in self._aliases:
            self._check_manages(name, caller)
            self._database.save_alias(name, None)
            del self._aliases[name]
            audit("alias removed", name=name, by=caller.id)
            return True
        if caller.may_manage(name) and any(info.name == name for info in self._failed()):
            del self._gone[name]
            return True
        entry = self._managed(name, caller)
        if entry.uses and drain is None and not force:
            raise AdapterBusyError(
                f"{len(entry.uses)} requests use {name}.",
                hint="Give drain=SECONDS to wait for them, or force=true to end them.",
            )
        self._take_away(entry)
        audit("removed", name=name, digest=entry.current and entry.current.digest, by=caller.id)
        if not await entry.is_idle(drain or 0) and force:
            for use in entry.uses:
                use.revoked.set()
            await entry.is_idle(_ENDING)
        await self._keeper.settled([version.digest for version in entry.stored.versions])
        return not entry.uses

    def _take_away(self, entry: RegisteredName) -> None:
        """Remove a name at once, so that no new request gets it."""
        name = entry.stored.name
        if entry.stored.versions:
            self._database.remove(name)
        del self._names[name]
        self._aliases = {alias: target for alias, target in self._aliases.items() if target != name}
        entry.removed = True
        self._keeper.count(entry.stored, -1)
        for task in entry.tasks:
            task.cancel()
        for version in entry.stored.versions:
            self._keeper.let_go(version.digest)
        if entry.uses:
            self._leaving.append(entry)
        self._remember(
            name, AdapterRemovedError(f"The adapter {name} was removed.", hint="Register it again, or take another.")
        )

    def _remember(self, name: str, error: ServingError) -> None:
        now = self._clock()
        self._gone[name] = _Gone(now + self._options.remembered, error)
        self._gone.move_to_end(name)
        while self._gone and (len(self._gone) > _MOST_GONE or next(iter(self._gone.values())).until <= now):
            self._gone.popitem(last=False)

    # -- moving, pinning, naming ---------------------------------------------------------------------------

    async def rollback(self, name: str, caller: Caller, *, to: str | None = None) -> AdapterInfo:
        """Move a name to its previous version, or to the one whose digest begins with ``to``.

        Raises:
            ModelNotFoundError: there is none, or its bytes are not in the store any more.
        """
        entry = self._managed(name, caller)
        async with entry.changing:
            target = self._earlier(entry, to)
            with self._keeper.hold(target.digest):
                await self._loaded(target.digest, entry)
                entry.check_there()
                last = entry.current
                self._save(entry, current=target.number)
                audit("rolled back", name=name, digest=target.digest, by=caller.id)
                if last is not None:
                    self._keeper.let_go(last.digest)
        return self._view().info(entry)

    def _earlier(self, entry: RegisteredName, to: str | None) -> StoredVersion:
        if to is not None:
            return self._version(entry, to.removeprefix("sha256:"))
        earlier = [v for v in entry.stored.versions if v.number < entry.stored.current and self._store.get(v.digest)]
        if not earlier:
            raise ModelNotFoundError(
                f"{entry.stored.name} has no earlier version in the store.", hint="Register it again with replace=true."
            )
        return earlier[-1]

    def pin(self, name: str, caller: Caller, *, pinned: bool = True) -> AdapterInfo:
        """Keep an adapter loaded and stored, or end that."""
        entry = self._managed(name, caller)
        if entry.stored.pinned != pinned:
            self._save(entry, pinned=pinned)
            audit("pinned" if pinned else "unpinned", name=name, by=caller.id)
        if pinned and entry.current is not None:
            self._residency.prefetch(entry.current.digest)
        return self._view().info(entry)

    def alias(self, alias: str, name: str, caller: Caller) -> AdapterInfo:
        """Give a name another name; an alias that exists moves."""
        self._check_manages(check_name(alias), caller)
        if alias == self._base_name or alias in self._names:
            raise AdapterExistsError(f"{alias!r} is a name already.", hint="Take another alias.", param="alias")
        entry = self._managed(name, caller)
        self._database.save_alias(alias, entry.stored.name)
        self._aliases[alias] = entry.stored.name
        audit("alias", name=name, alias=alias, by=caller.id)
        return self._view().info(entry)

    async def warm(self, name: str, caller: Caller) -> AdapterInfo:
        """Load an adapter's current version into the engine.

        Raises:
            ServingError: there is none, or it cannot be loaded.
        """
        with self.use(name, caller) as use:
            if use.digest is not None:
                async with self._residency.lease(use.digest):
                    pass
        return self.adapter(name, caller)

    # -- asking --------------------------------------------------------------------------------------------

    def adapters(self, caller: Caller) -> list[AdapterInfo]:
        """Return the state of all names that the caller may use."""
        names = [*self._names.values(), *(name for name in self._leaving if name.stored.name not in self._names)]
        infos = [*map(self._view().info, names), *self._failed()]
        return [info for info in infos if caller.may_use(info.name)]

    def adapter(self, name: str, caller: Caller) -> AdapterInfo:
        """Return the state of a name.

        Raises:
            ModelNotFoundError: there is none, or not for this caller. AdapterRemovedError: it went a short time ago.
        """
        if name in self._names or name in self._aliases or not caller.may_use(name):
            return self._view().info(self._found(Reference(name), caller))
        leaving = [entry for entry in self._leaving if entry.stored.name == name]
        if leaving:
            return self._view().info(leaving[-1])
        failed = [info for info in self._failed() if info.name == name]
        return failed[0] if failed else self._view().info(self._found(Reference(name), caller))

    def _view(self) -> AdapterView:
        return AdapterView(self._store, self._residency, self._keeper, self._aliases, self._residency.quarantined)

    def _failed(self) -> list[AdapterInfo]:
        """Return the names that never came to be, as long as they are remembered."""
        return [
            AdapterInfo(name, State.FAILED, None, error=gone.error.message, hint=gone.error.hint)
            for name, gone in self._gone.items()
            if name not in self._names and self._clock() < gone.until and not gone.was_there
        ]

    @contextmanager
    def use(self, model: str, caller: Caller) -> Iterator[Use]:
        """Give the version that ``model`` names now, which stays as long as the block runs.

        Args:
            model: an adapter, an alias, ``name@digest``, or the base's name.
            caller: who asks.

        Raises:
            ModelNotFoundError, AdapterRemovedError, AdapterInvalidError, AdapterLoadingError: there is none to use.
        """
        if model == self._base_name and caller.may_use(model):
            yield Use(model, None, None)
            return
        reference = read_reference(model)
        entry = self._found(reference, caller)
        version = self._version(entry, reference.prefix)
        adapter = self._store.get(version.digest)
        if adapter is None:
            raise AdapterInvalidError(
                f"The bytes of {entry.stored.name} are not in the store.", hint="Register it again with replace=true."
            )
        use = Use(entry.stored.name, version.digest, adapter)
        with self._keeper.hold(version.digest), self._used(entry, use):
            yield use

    @contextmanager
    def _used(self, entry: RegisteredName, use: Use) -> Iterator[None]:
        entry.last_used = self._clock()
        entry.uses.add(use)
        try:
            yield
        finally:
            entry.uses.discard(use)
            if not entry.uses:
                if entry.idle is not None:
                    entry.idle.set()
                self._leaving = [other for other in self._leaving if other is not entry]

    def _found(self, reference: Reference, caller: Caller) -> RegisteredName:
        name = self._aliases.get(reference.name, reference.name)
        if caller.may_use(name):
            entry = self._names.get(name)
            if entry is not None:
                return entry
            gone = self._gone.get(name)
            if gone is not None and self._clock() < gone.until:
                raise again(gone.error)
        if name == self._base_name and caller.may_use(name):
            raise ModelNotFoundError(
                f"{name!r} is the base, and no adapter.", hint="Ask for it by its name alone.", param="model"
            )
        visible = [other for other in (self._base_name, *self._names, *self._aliases) if caller.may_use(other)]
        raise ModelNotFoundError(
            f"No model is named {reference.name!r}.",
            hint=f"{did_you_mean(reference.name, visible)}GET /v1/models lists those that you may use.",
            param="model",
        )

    def _version(self, entry: RegisteredName, prefix: str) -> StoredVersion:
        if not prefix:
            if entry.current is None:
                raise AdapterLoadingError(
                    f"The adapter {entry.stored.name} is being registered.", hint="Ask again soon.", retry_after=1
                )
            return entry.current
        found = entry.matching(prefix)
        if len(found) != 1 or self._store.get(found[0].digest) is None:
            raise ModelNotFoundError(
                f"{entry.stored.name} has {'several versions' if len(found) > 1 else 'no version'} whose digest begins "
                f"with {prefix!r}.",
                hint=f"GET /v1/adapters/{entry.stored.name} lists its versions.",
                param="model",
            )
        return found[0]

    def _managed(self, name: str, caller: Caller) -> RegisteredName:
        entry = self._found(Reference(name), caller)
        self._check_manages(entry.stored.name, caller)
        return entry

    def _check_manages(self, name: str, caller: Caller) -> None:
        if not caller.may_manage(name):
            where = f"{caller.tenant}/NAME" if caller.tenant else " or ".join(caller.adapters)
            raise NotAllowedError(
                f"The key {caller.id} may not manage {name!r}.", hint=f"It may manage {where}.", param="name"
            )
