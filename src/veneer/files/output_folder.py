"""Checks a folder that is to be written, before any work is done for it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from veneer.errors import OutputError
from veneer.files.atomic_write import writing
from veneer.files.paths import exists, nearest_existing


def check_output(folder: Path, overwrite: bool | None = None) -> None:
    """Refuse a folder that cannot be written, or that holds something already.

    Args:
        folder: where an output is to go.
        overwrite: whether its contents may be replaced; ``None`` where a caller has no option for that.

    Raises:
        OutputError: it is a file, closed to writing, or not empty.
    """
    check_writable(folder)
    if not overwrite and exists(folder) and any(folder.iterdir()):
        replace = "" if overwrite is None else ", or pass --overwrite (overwrite=True)"
        raise OutputError(f"{folder} is not empty.", hint=f"Choose another folder{replace}.")


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, even an empty one.

    Raises:
        OutputError: it is a file, no name that the system takes, or closed to writing.
    """
    if exists(folder) and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", hint="Give a folder that does not exist yet.")
    with writing(folder), suppress(FileNotFoundError):
        folder.lstat()  # refuses a name that is too long
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"{folder} cannot be written: {nearest} is no folder open to writing.", hint="Choose another place."
        )
