"""Holds a name of the registry, and what goes on with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from veneer.serving.registry_database import StoredName, StoredVersion
from veneer.serving.registry_types import AdapterInfo, Use
from veneer.serving.serving_errors import AdapterRemovedError, ServingError
from veneer.serving.waiting import is_set_within


@dataclass(eq=False, slots=True)
class RegisteredName:
    """A name, its uses, and what is done to it.

    Attributes:
        stored: the name, its versions and its pin, as they are on disk.
        changing: held by what moves the name.
        tasks: the registrations under way.
        uses: the requests that use it.
        idle: set when the last of them ends; made when somebody waits for that, since there are thousands of names.
        last_used: when the last one came.
        error: why the last registration failed.
        seconds: phase -> seconds of the last registration.
        removed: no new request gets it.
    """

    stored: StoredName
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[AdapterInfo]] = field(default_factory=set)
    uses: set[Use] = field(default_factory=set)
    idle: asyncio.Event | None = None
    last_used: float | None = None
    error: ServingError | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    removed: bool = False

    @property
    def current(self) -> StoredVersion | None:
        """The version that requests get; ``None`` before the first is ready."""
        return next((v for v in self.stored.versions if v.number == self.stored.current), None)

    def check_there(self) -> None:
        """Raise ``AdapterRemovedError`` where the name was removed."""
        if self.removed:
            raise AdapterRemovedError(f"The adapter {self.stored.name} was removed meanwhile.")

    def matching(self, prefix: str) -> list[StoredVersion]:
        """Return the versions whose digests begin so."""
        return [v for v in self.stored.versions if v.digest.removeprefix("sha256:").startswith(prefix)]

    async def is_idle(self, seconds: float) -> bool:
        """Wait until no request uses the name, at most ``seconds``; tell whether that is so."""
        if self.uses:
            self.idle = self.idle or asyncio.Event()
            self.idle.clear()
            await is_set_within(self.idle, seconds)
        return not self.uses
