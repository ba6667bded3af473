"""Maps names to immutable versions of adapters; a name moves at once, and what runs keeps its version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from veneer.serving.auth import Caller
from veneer.serving.registry_types import AdapterInfo, Registration, Use


class Registry:
    """Holds the names of all adapters. Its methods are called from the event loop's thread."""

    async def open(self) -> None:
        """Read the names that an earlier process left, and tidy the store."""
        raise NotImplementedError

    async def close(self) -> None:
        """End what runs in the background, and close the files."""
        raise NotImplementedError

    async def register(self, registration: Registration, caller: Caller) -> AdapterInfo:
        """Fetch, check and load an adapter, and move the name to it; the same bytes again change nothing.

        Raises:
            ServingError: it is refused, or cannot be had; the name stays where it is.
        """
        raise NotImplementedError

    def begin(self, registration: Registration, caller: Caller) -> AdapterInfo:
        """Register in the background; ``adapter()`` tells how it goes, a refusal of name or source is raised."""
        raise NotImplementedError

    async def remove(self, name: str, caller: Caller, *, drain: float | None = None, force: bool = False) -> bool:
        """Remove a name, its history, and the bytes that no other name has.

        Args:
            name: the adapter's name, or an alias, which goes alone.
            caller: who asks.
            drain: wait so many seconds for the requests that use it; ``None`` refuses where there are any.
            force: after that, cancel them.

        Returns:
            False while requests still use it: it goes when they are done.

        Raises:
            AdapterBusyError: requests use it, and ``drain`` is ``None``.
        """
        raise NotImplementedError

    async def rollback(self, name: str, caller: Caller, *, to: str | None = None) -> AdapterInfo:
        """Move a name to its previous version, or to the one whose digest begins with ``to``."""
        raise NotImplementedError

    def pin(self, name: str, caller: Caller, *, pinned: bool = True) -> AdapterInfo:
        """Keep an adapter loaded and stored, or end that."""
        raise NotImplementedError

    def alias(self, alias: str, name: str, caller: Caller) -> AdapterInfo:
        """Give a name another name; an alias that exists moves."""
        raise NotImplementedError

    async def warm(self, name: str, caller: Caller) -> AdapterInfo:
        """Load an adapter's current version into the engine."""
        raise NotImplementedError

    def adapters(self, caller: Caller) -> list[AdapterInfo]:
        """Return the state of all names that the caller may use."""
        raise NotImplementedError

    def adapter(self, name: str, caller: Caller) -> AdapterInfo:
        """Return the state of a name.

        Raises:
            ModelNotFoundError: there is none, or not for this caller. AdapterRemovedError: it went a short time ago.
        """
        raise NotImplementedError

    @contextmanager
    def use(self, model: str, caller: Caller) -> Iterator[Use]:
        """Give the version that ``model`` names now, which stays as long as the block runs.

        Args:
            model: an adapter, an alias, ``name@digest``, or the base's name.
            caller: who asks.

        Raises:
            ModelNotFoundError, AdapterRemovedError, AdapterInvalidError, AdapterLoadingError, DrainingError: there is
                none to use.
        """
        raise NotImplementedError
        yield
