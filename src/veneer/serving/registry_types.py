"""Defines what the registry is asked, and what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from veneer.serving.serving_errors import AdapterRemovedError

# Told of each phase of an adapter's load, and of its seconds.
OnPhase = Callable[[str, float], None]


def ignore_phase(phase: str, seconds: float) -> None:
    """Take the seconds of a phase for nobody."""


class State(str, Enum):
    """The state of a version of an adapter."""

    LOADING = "loading"  # its files are fetched and checked, or the engine loads it for the first time
    READY = "ready"  # requests are answered
    DRAINING = "draining"  # no new requests; it goes when the running ones are done
    FAILED = "failed"  # it cannot be served: see the error


@dataclass(frozen=True)
class Registration:
    """A request to give a name to an adapter.

    Attributes:
        name: ``name`` or ``tenant/name``.
        source: a folder, ``file://``, ``hf://owner/name``, a hub id, or a URL that fsspec opens.
        revision: of the hub.
        subfolder: the folder below the source.
        digest: refuse other bytes than these (``sha256:`` and 64 digits).
        replace: let the name move to a new version where it has one.
        pin: keep it loaded, and in the store.
        check: load it into the engine before the name moves; without it the first request does.
        trusted: the operator gave the source when the server was started, so that the allow-list does not count.
    """

    name: str
    source: str
    revision: str | None = None
    subfolder: str | None = None
    digest: str | None = None
    replace: bool = False
    pin: bool = False
    check: bool = True
    trusted: bool = False


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in the store.

    Attributes:
        digest: ``sha256:`` and 64 digits, of the names and bytes of all its files.
        folder: where they are; read-only.
        nbytes: their bytes.
        method: its ``peft_type``.
        rank: its largest rank; 0 for a method without one.
        base: the base that its config names.
        files: their names.
    """

    digest: str
    folder: Path
    nbytes: int
    method: str
    rank: int
    base: str | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class VersionInfo:
    """A version in the history of a name.

    Attributes:
        number: 1 for the first.
        digest: of its files.
        created: seconds since the epoch.
        source: where it came from, without secrets and local paths.
        state: its state.
    """

    number: int
    digest: str
    created: float
    source: str
    state: State


@dataclass(frozen=True)
class AdapterInfo:
    """The state of a name.

    Attributes:
        name: the adapter's name.
        state: of its current version, or of the registration that goes on.
        current: its current version; ``None`` before the first is ready.
        versions: the history, oldest first.
        adapter: the files of the current version.
        aliases: other names for it.
        pinned: kept loaded, and in the store.
        memory_bytes: the memory that it takes in the engine; ``None`` where it is not loaded.
        leases: the requests that wait for it or use it, in all its versions.
        last_used: when the last one came; ``None`` for never.
        error, hint: why the last registration or load failed.
        load_seconds: phase -> seconds of the last load: ``fetch``, ``room``, ``verify``, ``engine``.
    """

    name: str
    state: State
    current: VersionInfo | None
    versions: tuple[VersionInfo, ...] = ()
    adapter: StoredAdapter | None = None
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    memory_bytes: int | None = None
    leases: int = 0
    last_used: float | None = None
    error: str | None = None
    hint: str | None = None
    load_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def resident(self) -> bool:
        """True where it is loaded in the engine."""
        return self.memory_bytes is not None


@dataclass(frozen=True, eq=False)
class Use:
    """The version that answers a request, from its arrival to its end; names may move meanwhile.

    Attributes:
        name: the adapter's name, or the base's.
        digest: the version, as the engine knows it; ``None`` for the base.
        adapter: its files; ``None`` for the base.
        revoked: set when the adapter is removed by force.
    """

    name: str
    digest: str | None
    adapter: StoredAdapter | None
    revoked: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def check(self) -> None:
        """Raise ``AdapterRemovedError`` where the adapter was removed by force meanwhile."""
        if self.revoked.is_set():
            raise AdapterRemovedError(f"The adapter {self.name} was removed.", hint="Take another.")

    @property
    def label(self) -> str:
        """The name and digest that an answer carries: ``pirate@sha256:1a2b...``; the base's name alone."""
        return self.name if self.digest is None else f"{self.name}@{self.digest}"
