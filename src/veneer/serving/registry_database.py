"""Keeps the names of adapters in a file of SQLite, so that they are there after a restart."""

from __future__ import annotations

import sqlite3
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import CorruptFileError, OutputError
from veneer.files.atomic_write import writing
from veneer.serving.source_files import KnownSource

_FILE = "registry.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, current INTEGER, next INTEGER, pinned INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (
    name TEXT, number INTEGER, digest TEXT, created REAL, source TEXT, PRIMARY KEY (name, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aliases (alias TEXT PRIMARY KEY, name TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sources (url TEXT PRIMARY KEY, fingerprint TEXT, digest TEXT) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class StoredVersion:
    """A version of a name: its number, the digest of its files, when it came, and where from."""

    number: int
    digest: str
    created: float
    source: str


@dataclass(frozen=True)
class StoredName:
    """A name: its versions, the number of the current one, the number of the next one, and whether it is pinned."""

    name: str
    current: int
    next: int
    pinned: bool
    versions: tuple[StoredVersion, ...]


class RegistryDatabase:
    """Holds the file, which belongs to one process at a time."""

    def __init__(self, root: Path) -> None:
        self._path = root / _FILE
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file, or make it.

        Raises:
            OutputError: another server has it, or it cannot be written. CorruptFileError: it is damaged.
        """
        with writing(self._path), self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=1, isolation_level=None, check_same_thread=False)
            self._connection = connection
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def known_source(self, url: str) -> KnownSource | None:
        """Return what was fetched from a source; ``None`` for one that cannot be told from a changed one."""
        with self._errors():
            row = self._open.execute("SELECT fingerprint, digest FROM sources WHERE url = ?", (url,)).fetchone()
            return KnownSource(*row) if row else None

    def save_source(self, url: str, source: KnownSource) -> None:
        """Write what was fetched from a source."""
        with self._changes() as connection:
            values = url, source.fingerprint, source.digest
            connection.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?)", values)

    def tidy(self) -> None:
        """Forget the sources of what no name has any more."""
        with self._changes() as connection:
            connection.execute("DELETE FROM sources WHERE digest NOT IN (SELECT digest FROM versions)")

    def names(self) -> list[StoredName]:
        """Return all names."""
        with self._errors():
            versions: dict[str, list[StoredVersion]] = defaultdict(list)
            rows = self._open.execute("SELECT * FROM versions ORDER BY name, number")
            for name, number, digest, created, source in rows:
                versions[name].append(StoredVersion(number, sys.intern(digest), created, source))
            rows = self._open.execute("SELECT * FROM names ORDER BY name")
            return [StoredName(n, current, next_, bool(pin), tuple(versions[n])) for n, current, next_, pin in rows]

    def aliases(self) -> dict[str, str]:
        """Return alias -> name."""
        with self._errors():
            return dict(self._open.execute("SELECT alias, name FROM aliases ORDER BY alias"))

    def save(self, name: StoredName) -> None:
        """Write a name as it is now."""
        rows = [(name.name, v.number, v.digest, v.created, v.source) for v in name.versions]
        with self._changes() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?)", (name.name, name.current, name.next, name.pinned)
            )
            connection.execute("DELETE FROM versions WHERE name = ?", (name.name,))
            connection.executemany("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", rows)

    def remove(self, name: str) -> None:
        """Remove a name, its versions and its aliases."""
        with self._changes() as connection:
            connection.execute("DELETE FROM names WHERE name = ?", (name,))
            connection.execute("DELETE FROM versions WHERE name = ?", (name,))
            connection.execute("DELETE FROM aliases WHERE name = ?", (name,))

    def save_alias(self, alias: str, name: str | None) -> None:
        """Write an alias; remove it where ``name`` is ``None``."""
        with self._changes() as connection:
            if name is None:
                connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,))
            else:
                connection.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias, name))

    @property
    def _open(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    @contextmanager
    def _changes(self) -> Iterator[sqlite3.Connection]:
        """Write all changes of the block, or none."""
        with self._errors("The file of names"):  # its path is no client's
            self._open.execute("BEGIN IMMEDIATE")
            try:
                yield self._open
                self._open.execute("COMMIT")
            except BaseException:
                if self._open.in_transaction:  # SQLite itself ends some that fail, such as on a full disk
                    self._open.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self, file: str = "") -> Iterator[None]:
        file = file or str(self._path)
        try:
            yield
        except sqlite3.OperationalError as error:
            is_taken = "locked" in str(error)
            raise OutputError(
                f"{file} cannot be written: {'another server uses it' if is_taken else error}.",
                hint="Give each server a --store of its own." if is_taken else "Is the disk full, or read-only?",
            ) from error
        except sqlite3.DatabaseError as error:
            raise CorruptFileError(
                f"{file} is damaged: {error}.",
                hint="Move it away and start again; the adapters have to be registered anew.",
            ) from error
