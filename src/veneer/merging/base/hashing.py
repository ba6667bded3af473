"""Computes digests of files in background threads. No torch: it begins while torch is imported.

A digest is written with its algorithm: ``blake3:<hex>``.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from veneer.adapters.merge.cores import cores
from veneer.errors import MergeError, SourceError

# Bytes read at a time while other threads compute: many, for each return from a read waits for its turn in Python.
_BLOCK = 1 << 24
# Each thread takes a block of memory, and one hashes more bytes a second than most disks give.
_MOST_THREADS = 4

# Of new digests: 7.4 GB/s on one core instead of 2.1; benchmarks/notes.md, The merge from disk to disk.
ALGORITHM = "blake3"
_HASHERS: Mapping[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Of a file: its size, time of change in nanoseconds, and inode.
Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp, which changes when the file is written to or replaced."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """Return the stamps of files; raise ``SourceError`` where one cannot be read."""
    try:
        return {path: stamp_of(path) for path in paths}
    except OSError as error:
        raise SourceError(
            f"{error.filename} cannot be read: {error.strerror}.", hint="Check the path and its permissions."
        ) from error


def check_unchanged(before: Mapping[Path, Stamp]) -> None:
    """Raise ``MergeError`` when a file no longer has the stamp that it had before."""
    for path, stamp in before.items():
        try:
            changed = stamp_of(path) != stamp
        except OSError as error:
            raise MergeError(f"{path} went away while it was read: {error.strerror}.", hint="Merge again.") from error
        if changed:
            raise MergeError(
                f"{path} changed while it was read; the output is not kept.",
                hint="Merge again when nothing writes to its folder.",
            )


def is_digest(value: Any) -> bool:
    """Tell whether a value is the digest of an algorithm that is known here."""
    return isinstance(value, str) and value.partition(":")[0] in _HASHERS


def digest_in_cache(path: Path) -> str | None:
    """Return the SHA-256 by which the hub's cache names a file; ``None`` for one elsewhere, or a small one.

    It is what the hub told when the file was downloaded, and says nothing of a blob that was damaged since.
    """
    blob = path.resolve()
    is_named = blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) is not None
    is_in_snapshot = blob.parent.with_name("snapshots") in path.parent.resolve().parents
    return f"sha256:{blob.name}" if is_named and is_in_snapshot else None


def matches(path: Path, digest: str) -> bool:
    """Tell whether a file is there and has a digest; it is read for this."""
    return path.is_file() and digest_of(path, algorithm=digest.partition(":")[0]) == digest


def digest_of(path: Path, given_up: Callable[[], bool] = lambda: False, algorithm: str = ALGORITHM) -> str:
    """Compute the digest of a file; raise ``CancelledError`` when ``given_up`` becomes true on the way."""
    digest, block = _HASHERS[algorithm](), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            if given_up():
                raise CancelledError
            digest.update(block[:count])
    return f"{algorithm}:{digest.hexdigest()}"


class Hashing:
    """Hashes files in the background, on all cores but one. Those that the hub's cache names are not read.

    Args:
        likely: files that will probably be needed; those that are gone are left out.
    """

    def __init__(self, likely: Iterable[Path] = ()) -> None:
        self._pool = ThreadPoolExecutor(max(1, min(cores() - 1, _MOST_THREADS)))
        self._closed = threading.Event()
        self._begun: dict[Path, tuple[Stamp, Future[str]]] = {}
        self._expected: dict[str, Path] = {}
        for path in likely:
            with suppress(OSError):
                self._begin(path, stamp_of(path))

    def _begin(self, path: Path, stamp: Stamp) -> None:
        if (known := digest_in_cache(path)) is None:
            digest = self._pool.submit(digest_of, path, self._closed.is_set)
        else:
            digest = Future()
            digest.set_result(known)
        self._begun[path] = stamp, digest

    def expect(self, paths: Mapping[str, Path], stamps: Mapping[str, Stamp]) -> None:
        """Name the files that are needed, and begin those that have not begun or had another stamp then.

        Args:
            paths: name -> file.
            stamps: name -> the file's stamp when it was opened.
        """
        self._expected = dict(paths)
        for name, path in paths.items():
            if path not in self._begun or self._begun[path][0] != stamps[name]:
                self._begin(path, stamps[name])

    def result(self) -> dict[str, str]:
        """Wait for the files that are needed, and return the digest of each by name."""
        return {name: self._begun[path][1].result() for name, path in self._expected.items()}

    def close(self) -> None:
        """Stop hashing; files that are not finished are given up."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
