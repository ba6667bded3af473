"""Keeps adapters on disk by their digests; each is fetched, checked and copied once, and its source not read again.

store/<64 digits>/adapter_config.json, adapter_model.safetensors, ...    read-only, and whole or not there
store/<64 digits>/.stored.json                                           the facts that the server needs
store/.fetching-xyz/, store/.removing-xyz/                               on their way in and out
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import SourceError
from veneer.files.atomic_write import writing
from veneer.files.json_file import read_json
from veneer.printing import nbytes
from veneer.serving.fetch import FACTS, FETCHING, Fetch, FetchRules, digest_in, remove_folder
from veneer.serving.registry_types import StoredAdapter
from veneer.serving.serving_errors import AdapterInvalidError, SourceFailedError
from veneer.serving.source_files import AdapterSource, KnownSource

_REMOVING = ".removing-"
# Fetches that run at once, most of the time waiting for the disk or the network; the others wait.
_FETCHES = 8


@dataclass(frozen=True)
class StoreLimits:
    """The limits of what is stored.

    Attributes:
        store_bytes: of all adapters together.
        adapter_bytes: of one.
        rank: the largest of one; ``None`` for any.
    """

    store_bytes: int = 50_000_000_000
    adapter_bytes: int = 4_000_000_000
    rank: int | None = None


@dataclass(frozen=True)
class Fetched:
    """An adapter in the store, and where it came from, without secrets and local paths.

    Attributes:
        adapter: the adapter.
        label: the source.
        known: tells an unchanged source the next time; ``None`` where that is not certain.
    """

    adapter: StoredAdapter
    label: str
    known: KnownSource | None


class Store:
    """Holds adapters on disk. Its methods are called from the event loop's thread; files are copied in others."""

    def __init__(
        self,
        root: Path,
        limits: StoreLimits | None = None,
        *,
        base_digest: str | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        limits = limits or StoreLimits()
        self.root, self._limit = root, limits.store_bytes
        self._rules = FetchRules(root, limits.adapter_bytes, limits.rank, base_digest, check)
        self._threads = ThreadPoolExecutor(_FETCHES, "veneer-fetch")
        # In the order of their last use.
        self._adapters: dict[str, StoredAdapter] = {}
        self._verified: set[str] = set()
        self._reserved = 0
        self._tasks: set[asyncio.Task[Fetched]] = set()
        #: Tells of a digest whether it must stay.
        self.is_needed: Callable[[str], bool] = lambda digest: False

    def open(self) -> None:
        """Make the folder, list what is there, and remove what an earlier process did not finish.

        Raises:
            OutputError: the folder cannot be written.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.root.glob(f"{FETCHING}*"), *self.root.glob(f"{_REMOVING}*")):
                remove_folder(leftover)
            folders = [folder for folder in self.root.iterdir() if (folder / FACTS).is_file()]
            for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
                with suppress(SourceError, KeyError, TypeError):
                    adapter = _read_facts(folder)
                    self._adapters[adapter.digest] = adapter

    async def close(self) -> None:
        """Wait for the fetches that go on."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    @property
    def used_bytes(self) -> int:
        """The bytes of all adapters in the store."""
        return sum(adapter.nbytes for adapter in self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def digests(self) -> set[str]:
        """The digests of all adapters in the store."""
        return set(self._adapters)

    def get(self, digest: str) -> StoredAdapter | None:
        """Return an adapter; ``None`` where the store has none of that digest."""
        return self._adapters.get(digest)

    def touch(self, digest: str) -> None:
        """Note that an adapter was used, so that others are removed before it."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._adapters[digest] = adapter

    async def add(self, source: AdapterSource, digest: str | None = None) -> Fetched:
        """Fetch an adapter, check it, and keep it; it is kept too where the caller stops waiting.

        Args:
            source: where it is.
            digest: the one that it must have.

        Raises:
            SourceFailedError: the source fails, or there is no room. AdapterTooLargeError: it is above a limit.
            AdapterInvalidError: it is damaged, a pickle, not finite, of another base, or has another digest.
        """
        return await asyncio.shield(self.begin(source, digest))

    def begin(
        self,
        source: AdapterSource,
        digest: str | None = None,
        arrived: Callable[[str], None] = lambda digest: None,
        known: KnownSource | None = None,
    ) -> asyncio.Task[Fetched]:
        """Begin what :meth:`add` waits for.

        Args:
            source: where the adapter is.
            digest: the one that it must have.
            arrived: called with the digest before it could be removed again.
            known: what was fetched from there before; where the source is unchanged, it is not read again.
        """
        task = asyncio.create_task(self._add(source, digest, arrived, known))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Fetched]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, where nobody waits for it any more

    async def _add(
        self, source: AdapterSource, digest: str | None, arrived: Callable[[str], None], known: KnownSource | None
    ) -> Fetched:
        loop = asyncio.get_running_loop()
        reserved = 0

        async def reserve(size: int) -> None:
            nonlocal reserved
            await self._make_room(size)
            self._reserved += size
            reserved = size

        def wait_for_room(size: int) -> None:
            asyncio.run_coroutine_threadsafe(reserve(size), loop).result()

        stored = None if known is None else self._adapters.get(known.digest)
        fetch = Fetch(self._rules, source, wait_for_room, known, stored)
        try:
            adapter = await loop.run_in_executor(self._threads, fetch.run, digest)
            if fetch.folder is None and adapter.digest not in self._adapters:  # it was removed meanwhile
                return await self._add(source, digest, arrived, None)
            replaced = self._place(fetch, adapter)
            arrived(adapter.digest)
            if fetch.folder is not None:
                with suppress(OSError):  # its files are on the disk; its name in the folder may come there later
                    await asyncio.to_thread(self._settle, fetch, replaced)
        finally:
            self._reserved -= reserved
        known = None if fetch.fingerprint is None else KnownSource(fetch.fingerprint, adapter.digest)
        return Fetched(self._adapters.get(adapter.digest, adapter), fetch.label, known)

    def _place(self, fetch: Fetch, adapter: StoredAdapter) -> Path | None:
        """Move a fetched adapter to its place; return where what lay there is now, if it may have been damaged."""
        replaced = None
        if adapter.digest not in self._verified and fetch.folder is not None:
            with writing(adapter.folder):
                replaced = self._take_away(adapter.folder)
                fetch.folder.rename(adapter.folder)
            self._adapters[adapter.digest] = adapter
            self._verified.add(adapter.digest)
        self.touch(adapter.digest)
        return replaced

    def _settle(self, fetch: Fetch, replaced: Path | None) -> None:
        fetch.discard()
        if replaced is not None:
            remove_folder(replaced)
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    async def _make_room(self, size: int) -> None:
        """Remove adapters that are not needed, those unused for longest first, until ``size`` bytes fit."""
        for digest in list(self._adapters):
            if self.used_bytes + self._reserved + size <= self._limit:
                break
            if not self.is_needed(digest):
                await self.remove(digest)
        free = min(self._limit - self.used_bytes - self._reserved, shutil.disk_usage(self.root).free)
        if size > free:
            raise SourceFailedError(
                f"The store has no room: the adapter has {nbytes(size)}, and {nbytes(max(free, 0))} are free.",
                hint="Remove adapters, make room on the disk, or raise --store-bytes.",
            )

    async def verify(self, digest: str) -> StoredAdapter:
        """Return an adapter whose bytes have its digest; they are read once in the life of the process.

        Raises:
            AdapterInvalidError: they are not there, or are others.
        """
        adapter = self._adapters.get(digest)
        if adapter is not None and digest not in self._verified:
            is_whole = await asyncio.to_thread(_is_whole, adapter)
            if self._adapters.get(digest) is not adapter:  # it went meanwhile, or a fetched copy took its place
                return await self.verify(digest)
            if is_whole:
                self._verified.add(digest)
            else:
                await self.remove(digest)
        if adapter is None or digest not in self._adapters:
            raise AdapterInvalidError(
                f"The store has no whole adapter {digest[:19]}.", hint="Register it again from its source."
            )
        return adapter

    async def remove(self, digest: str) -> None:
        """Remove an adapter's files; one that is not there is none."""
        adapter = self._adapters.pop(digest, None)
        self._verified.discard(digest)
        if adapter is not None:
            taken = self._take_away(adapter.folder)
            await asyncio.to_thread(remove_folder, taken)

    def _take_away(self, folder: Path) -> Path:
        """Rename a folder, so that its place is free at once."""
        away = self.root / f"{_REMOVING}{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            folder.rename(away)
        return away


def _is_whole(adapter: StoredAdapter) -> bool:
    """Tell whether the bytes of an adapter have its digest; they may be taken away while they are read."""
    try:
        return digest_in(adapter.folder, adapter.files) == adapter.digest
    except FileNotFoundError:
        return False


def _read_facts(folder: Path) -> StoredAdapter:
    facts = read_json(folder / FACTS)
    # Thousands of adapters have the same names of files, method and base.
    texts = {key: sys.intern(value) for key, value in facts.items() if isinstance(value, str)}
    return StoredAdapter(**{**facts, **texts, "folder": folder, "files": tuple(map(sys.intern, facts["files"]))})
