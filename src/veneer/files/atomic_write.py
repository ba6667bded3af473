"""Writes files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import OutputError, PathNotFoundError, SourceError, VeneerError
from veneer.files.paths import exists

_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` to write to; when the block ends well, it takes ``target``'s place.

    When the block raises, or the process dies, ``target`` is as it was.

    Raises:
        OutputError: nothing can be written there, or the disk is full.
    """
    hidden = f".{target.name}.writing-"
    with (
        writing(target),
        _folder(target.parent),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=hidden) as folder,
    ):
        temporary = Path(folder) / target.name
        yield temporary
        # Some writers choose a stricter mode than the user's.
        temporary.chmod(0o666 & ~_umask())
        flush(temporary)
        temporary.replace(target)


@contextmanager
def writing(target: Path, missing: type[SourceError] = PathNotFoundError) -> Iterator[None]:
    """Turn the system's refusal to write ``target`` inside the block into an error of Veneer's.

    Args:
        target: the file or folder.
        missing: the error where a folder above it is missing.

    Raises:
        OutputError: the system refuses, or safetensors does in its place.
    """
    try:
        yield
    except VeneerError:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        kind = missing if isinstance(error, FileNotFoundError) else OutputError
        is_full = any(text in reason for text in _FULL)
        hint = "Make room there, or choose another place." if is_full else "Choose another place."
        raise kind(f"{target} cannot be written: {reason}.", hint=hint) from error


def _refusal(error: Exception) -> str | None:
    """Return why the system refused to write; ``None`` when the error is another one."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors wraps the system's message in text of its own.
    return str(error).rpartition("I/O error: ")[2] if isinstance(error, SafetensorError) else None


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder, and take it away again when the block fails and leaves it empty."""
    new_folders = [place for place in (folder, *folder.parents) if not exists(place)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for place in new_folders:
                place.rmdir()
        raise


def flush(path: Path) -> None:
    """Wait until a file's contents are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
