"""Tells the state of the registry's names at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.serving.registered_name import RegisteredName
from veneer.serving.registry_database import StoredVersion
from veneer.serving.registry_types import AdapterInfo, State, VersionInfo
from veneer.serving.residency import Residency
from veneer.serving.store import Store
from veneer.serving.version_keeper import VersionKeeper


@dataclass(frozen=True)
class AdapterView:
    """Looks at names, and at what the store and the engine have of their versions.

    Attributes:
        store, residency, keeper: the registry's.
        aliases: alias -> name.
        quarantined: digest -> why the engine serves it no more.
    """

    store: Store
    residency: Residency
    keeper: VersionKeeper
    aliases: Mapping[str, str]
    quarantined: Mapping[str, str]

    def info(self, name: RegisteredName) -> AdapterInfo:
        """Return the state of a name."""
        current, stored = name.current, name.stored
        error, hint = self._failure(name)
        return AdapterInfo(
            name=stored.name,
            state=self._state(name),
            current=self._version(current) if current else None,
            versions=tuple(map(self._version, stored.versions)),
            adapter=self.store.get(current.digest) if current else None,
            aliases=tuple(alias for alias, target in self.aliases.items() if target == stored.name),
            pinned=stored.pinned,
            memory_bytes=self.residency.memory(current.digest) if current else None,
            leases=len(name.uses),
            last_used=name.last_used,
            error=error,
            hint=hint,
            load_seconds=name.seconds | (self.residency.load_seconds(current.digest) if current else {}),
        )

    def _failure(self, name: RegisteredName) -> tuple[str | None, str | None]:
        """Return why the current version is not served, or why the last registration failed; and the hint."""
        digest = name.current.digest if name.current else ""
        if digest in self.quarantined:
            return self.quarantined[digest], None
        error = self.residency.failure(digest) or name.error
        return (error.message, error.hint) if error else (None, None)

    def _state(self, name: RegisteredName) -> State:
        if name.removed:
            return State.DRAINING
        return State.LOADING if name.current is None else self._state_of(name.current.digest)

    def _state_of(self, digest: str) -> State:
        is_whole = self.store.get(digest) is not None and self.residency.failure(digest) is None
        return State.READY if is_whole and digest not in self.quarantined else State.FAILED

    def _version(self, version: StoredVersion) -> VersionInfo:
        state = State.DRAINING if self.keeper.is_left(version.digest) else self._state_of(version.digest)
        return VersionInfo(version.number, version.digest, version.created, version.source, state)
