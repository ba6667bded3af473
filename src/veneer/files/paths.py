"""Looks at paths, and never raises, not even for text that can be no path."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path


def exists(path: Path) -> bool:
    """Tell whether something is at ``path``; false where the system cannot look, as for a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Tell whether a file is at ``path``; false where the system cannot look."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Tell whether a folder is at ``path``; false where the system cannot look."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or the nearest of its parents that exists."""
    return next((place for place in (path, *path.parents) if exists(place)), Path())


def nearest_path(path: Path) -> str:
    """Return a hint for a path that does not exist: similar names beside it."""
    parent = path.parent
    while not is_folder(parent) and parent != parent.parent:
        path, parent = parent, parent.parent
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder whose names are not for us
        names = sorted(p.name for p in parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=2)
    if near:
        return f"Did you mean {' or '.join(str(parent / name) for name in near)}?"
    where = "the current folder" if parent == Path() else str(parent)
    return f"There is no {path.name!r} in {where}." if path.name else "Give a folder or a hub id."
