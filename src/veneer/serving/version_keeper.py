"""Counts what each version is needed for, and frees it when nothing needs it any more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from veneer.serving.registry_database import StoredName
from veneer.serving.residency import Residency
from veneer.serving.serving_errors import AdapterBusyError
from veneer.serving.store import Store


class VersionKeeper:
    """Keeps a version loaded and stored that is in use or current, and stored one that a rollback may come to."""

    def __init__(self, store: Store, residency: Residency) -> None:
        self._store, self._residency = store, residency
        # Digest -> how many requests and registrations hold it, how many names it is the current version of, how many
        # of those are pinned, and how many know it.
        self._holds: Counter[str] = Counter()
        self._current: Counter[str] = Counter()
        self._pinned: Counter[str] = Counter()
        self._known: Counter[str] = Counter()
        self._tasks: dict[asyncio.Task[None], str] = {}
        store.is_needed = self.is_needed
        residency.is_pinned = lambda digest: self._pinned[digest] > 0

    def __len__(self) -> int:
        return len(self._holds) + len(self._current) + len(self._known) + len(self._tasks)

    def is_needed(self, digest: str) -> bool:
        """Tell whether a version is in use, or a name's current one."""
        return self._holds[digest] > 0 or self._current[digest] > 0

    def is_left(self, digest: str) -> bool:
        """Tell whether a version is in use, and no name's current one."""
        return self._holds[digest] > 0 and not self._current[digest]

    @property
    def known(self) -> set[str]:
        """All versions that names have."""
        return set(self._known)

    @property
    def pinned(self) -> set[str]:
        """The current versions of pinned names."""
        return set(self._pinned)

    def count(self, name: StoredName, by: int = 1) -> None:
        """Count the versions of a name, or with -1 count them no more."""
        for version in name.versions:
            _add(self._known, version.digest, by)
            if version.number == name.current:
                _add(self._current, version.digest, by)
                _add(self._pinned, version.digest, by * name.pinned)

    def claim(self, digest: str) -> None:
        """Keep a version until it is released as often."""
        _add(self._holds, digest, 1)

    def release(self, digest: str) -> None:
        """Keep a version no longer for the sake of one claim."""
        _add(self._holds, digest, -1)
        self.let_go(digest)

    @contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """Keep a version as long as the block runs."""
        self.claim(digest)
        try:
            yield
        finally:
            self.release(digest)

    def let_go(self, digest: str) -> None:
        """Free a version in the background, where nothing needs it."""
        if not self.is_needed(digest):
            task = asyncio.create_task(self._free(digest))
            self._tasks[task] = digest
            task.add_done_callback(self._tasks.pop)

    async def settled(self, digests: Collection[str] | None = None) -> None:
        """Wait until those of some versions, or of all, are free that were let go."""
        while tasks := [task for task, digest in self._tasks.items() if digests is None or digest in digests]:
            await asyncio.wait(tasks)

    async def _free(self, digest: str) -> None:
        """Drop a version from the engine, and remove it from the store where no name knows it."""
        if not self.is_needed(digest):
            with suppress(AdapterBusyError):  # what holds it lets it go in its turn
                await self._residency.drop(digest)
        if not self.is_needed(digest) and not self._known[digest]:
            await self._store.remove(digest)


def _add(counter: Counter[str], key: str, number: int) -> None:
    counter[key] += number
    if not counter[key]:
        del counter[key]
