"""Resolves a path or hub id at a revision to a :class:`~veneer.files.source.Source`.

Local first: nothing reaches the network for a path that exists, for a hub id whose files are in the cache, or in
offline mode (``local_files_only``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from veneer.errors import CorruptFileError, NotACheckpointError, PathNotFoundError, PickleRefusedError, SourceError
from veneer.files.hub import from_hub
from veneer.files.hub_page import is_url, read_hub_page
from veneer.files.json_file import COPY_AGAIN, unreadable
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import FOREIGN_FILES, SAFETENSORS
from veneer.files.paths import exists, is_folder, nearest_path
from veneer.files.safetensors_header import read_header
from veneer.files.source import PICKLES, Source

# The files to fetch from the hub: all but weights in other formats.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*")
# As the hub has it: ``name`` or ``owner/name``, each beginning and ending with a letter, a digit or ``_``.
_HUB_ID = re.compile(r"(\w([\w.-]{,94}\w)?/)?\w([\w.-]{,94}\w)?", re.ASCII)
_NOT_IN_HUB_ID = ("..", "--")
_NOT_HUB_ENDINGS = (SAFETENSORS, ".git")
_DEFAULT = LookupOptions()


def resolve(
    path: str | os.PathLike[str],
    lookup: LookupOptions = _DEFAULT,
    *,
    what: str = "path",
    patterns: Sequence[str] = _PATTERNS,
) -> Source:
    """Find the files of a local folder, a single file of weights, a hub id, or a model's page on the hub.

    Args:
        path: what to find.
        lookup: where and how to look.
        what: what the path stands for, in errors: "adapter", "base".
        patterns: which files of a hub repository are needed.

    Raises:
        PathNotFoundError: nothing is there. NotACheckpointError: it is a file, and no safetensors file.
        SourceError: the hub refuses, or cannot be reached.
    """
    text, subfolder = os.fspath(path), lookup.subfolder
    if not text.strip():
        raise PathNotFoundError(f"The {what} is an empty string.", hint="Give a folder or a hub id.")
    local, is_a_file, is_a_folder = local_path(text, what)
    if is_a_file:
        if subfolder:
            raise PathNotFoundError(f"{text} is a file; it has no subfolder {subfolder!r}.", hint=f"Give {text} alone.")
        return _single_file(local, text)
    if not is_a_folder:
        if is_url(text):
            return from_hub(*read_hub_page(text, lookup, what), what, patterns)
        if isinstance(path, Path) or os.path.lexists(local) or not looks_like_hub_id(text):
            raise _missing(local, what)
        return from_hub(text, lookup, what, patterns)
    if not os.access(local, os.R_OK | os.X_OK):
        raise SourceError(f"The {what} {text} cannot be read: Permission denied.", hint="Check its permissions.")
    if subfolder:
        inner = Source(local, text).path(subfolder)
        if not is_folder(inner):
            raise PathNotFoundError(f"{text} has no subfolder {subfolder!r}.", hint=nearest_path(inner))
        return Source(inner, f"{text.rstrip('/')}/{subfolder}")
    return Source(local, text)


def looks_like_hub_id(text: str) -> bool:
    """Tell whether ``text`` can be ``name`` or ``owner/name`` on the hub, and is not plainly meant as a path."""
    plain = not any(part in text for part in _NOT_IN_HUB_ID) and not text.endswith(_NOT_HUB_ENDINGS)
    return plain and _HUB_ID.fullmatch(text) is not None


def local_path(text: str, what: str) -> tuple[Path, bool, bool]:
    """Return a path, whether it is a file, and whether it is a folder.

    Raises:
        PathNotFoundError: the system cannot even look there.
    """
    try:
        local = Path(text).expanduser()
        return local, local.is_file(), local.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, closed to us, ``~`` of nobody, half a character
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise PathNotFoundError(
            f"The {what} {text[:100]!r} cannot be looked up: {reason}.", hint="Give a folder or a hub id."
        ) from error


def _single_file(path: Path, text: str) -> Source:
    start = FOREIGN_FILES.get(path.suffix)
    there = b"" if start is None else _first_bytes(path, len(start))
    if start is not None and there == start:
        return Source(path.parent, text, file=path)
    if path.suffix != SAFETENSORS:
        kinds = [suffix for names in PICKLES.values() for name in names for suffix in [Path(name).suffix]]
        if path.suffix in kinds and path.suffix != ".json":
            raise PickleRefusedError(
                f"{text} is a pickle, which can run code; it is not opened.",
                hint=f"If you trust it: veneer convert-pickle {text}",
            )
        if start is not None and start.startswith(there):
            raise CorruptFileError(f"{text} is damaged: it is cut off after {len(there)} bytes.", hint=COPY_AGAIN)
        raise NotACheckpointError(
            f"{text} is a file, and no safetensors file.", hint="Give a checkpoint's folder, or its .safetensors file."
        )
    read_header(path)
    return Source(path.parent, text, file=path)


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from error


def _missing(path: Path, what: str) -> SourceError:
    if path.is_symlink():
        return PathNotFoundError(
            f"The {what} {str(path)!r} is a link to {str(path.readlink())!r}, which does not exist.",
            hint="Mend the link, or give the folder itself.",
        )
    if exists(path):
        return NotACheckpointError(
            f"The {what} {str(path)!r} is neither a file nor a folder.", hint="Give a folder or a hub id."
        )
    return PathNotFoundError(f"The {what} {str(path)!r} does not exist.", hint=nearest_path(path))
