"""SHA-256 of files, in threads beside what else is done. No torch: it begins while torch is imported."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from veneer.adapters.merge.cores import cores
from veneer.errors import MergeError, SourceError

# What is read at a time while other threads compute: large, for each return from a read waits for its turn in Python.
_BLOCK = 1 << 24
# Each takes a block of memory, and four of them 6 GB a second, which few disks give.
_MOST_THREADS = 4

# Of a file: its size, time of change in nanoseconds, and inode.
Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp:
    """What changes when a file is written to, or replaced."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """Each file, and what it is now; ``SourceError`` where one cannot be looked at."""
    try:
        return {path: stamp_of(path) for path in paths}
    except OSError as error:
        raise SourceError(
            f"{error.filename} cannot be read: {error.strerror}.", hint="Check the path and its permissions."
        ) from error


def check_unchanged(before: Mapping[Path, Stamp]) -> None:
    """Raise ``MergeError`` when a file is no longer what it was."""
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


def sha256_of(path: Path, given_up: Callable[[], bool] = lambda: False) -> str:
    """The SHA-256 of a file; ``CancelledError`` when ``given_up`` says so on the way."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            if given_up():
                raise CancelledError
            digest.update(block[:count])
    return digest.hexdigest()


class Hashing:
    """Hashes files in the background, on all cores but one.

    Args:
        likely: files that will probably be asked for; those that are gone are left out.
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
        self._begun[path] = stamp, self._pool.submit(sha256_of, path, self._closed.is_set)

    def expect(self, paths: Mapping[str, Path], stamps: Mapping[str, Stamp]) -> None:
        """Say which files are meant: one that has not begun, or began as another than its stamp says, begins now.

        Args:
            paths: name -> file.
            stamps: name -> what the file was when it was opened.
        """
        self._expected = dict(paths)
        for name, path in paths.items():
            if path not in self._begun or self._begun[path][0] != stamps[name]:
                self._begin(path, stamps[name])

    def result(self) -> dict[str, str]:
        """Name -> SHA-256 of what is expected; waits for the last."""
        return {name: self._begun[path][1].result() for name, path in self._expected.items()}

    def close(self) -> None:
        """Drop what is not finished."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
