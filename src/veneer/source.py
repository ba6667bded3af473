"""A path or hub id at a revision -> its files. Reads headers of safetensors files; imports no torch.

Local first: nothing reaches the network for a path that exists, for a hub id whose files are in the cache, or in
offline mode (``local_files_only``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from veneer.errors import (
    CorruptFileError,
    IncompleteCheckpointError,
    NotACheckpointError,
    PathNotFoundError,
    PickleRefusedError,
    SourceError,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_STEM = "model"
SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"

# The same weights as pickles, by stem: what older tools wrote.
PICKLES: Mapping[str, tuple[str, ...]] = {
    ADAPTER_STEM: ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth"),
    MODEL_STEM: ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth"),
}

# Bytes per value, by the name that a header gives a dtype.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# What is fetched from the hub: everything but other formats' weights.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*")
# As the hub has it: ``name`` or ``owner/name``, each beginning and ending with a letter, a digit or ``_``.
_HUB_ID = re.compile(r"(\w([\w.-]{,94}\w)?/)?\w([\w.-]{,94}\w)?", re.ASCII)
_NOT_IN_HUB_ID = ("..", "--")
_NOT_HUB_ENDINGS = (SAFETENSORS, ".git")
_MAX_HEADER = 100_000_000
_MAX_NUMBER = 1 << 64
_AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class Source:
    """A folder of files, wherever it came from.

    Attributes:
        root: the folder.
        origin: as it was asked for.
        file: the one file that was asked for, when it was not a folder.
        revision: the hub revision that was asked for.
        commit: the hub commit that it is.
    """

    root: Path
    origin: str
    file: Path | None = None
    revision: str | None = None
    commit: str | None = None

    def path(self, name: str) -> Path:
        """The path of a file in the folder; ``CorruptFileError`` when ``name`` would leave it."""
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name or not parts:
            raise CorruptFileError(
                f"{self.origin}: {name!r} points outside of its folder.", hint="Do not trust this checkpoint."
            )
        return self.root / name

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return is_file(self.path(name))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object read from a file of the folder."""
        return read_json(self.path(name))

    def files(self) -> list[str]:
        """The names of the files in the folder, sorted; hidden ones and subfolders left out."""
        return sorted(p.name for p in self.root.iterdir() if p.is_file() and not p.name.startswith("."))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it; ``start`` and ``end`` are bytes in the file's data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A safetensors file without its data. ``data_start`` is the offset of the data part in the file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_start: int = 8

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


# -- finding -----------------------------------------------------------------------------------------------


def resolve(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    what: str = "path",
    patterns: Sequence[str] = _WANTED,
) -> Source:
    """Find the files of a local folder, a single safetensors file, or a hub id.

    Args:
        path: what to find.
        revision: branch, tag or commit on the hub.
        subfolder: where below it to look.
        token: for the hub.
        local_files_only: use no network.
        cache_dir: the hub's cache; huggingface_hub's own when ``None``.
        force_download: ask the hub again for what the cache holds.
        what: what it is meant to be, for errors: "adapter", "base".
        patterns: which files of a hub repository are needed.

    Raises:
        PathNotFoundError: nothing is there. NotACheckpointError: it is a file, and no safetensors file.
        SourceError: the hub refuses, or cannot be reached.
    """
    text = os.fspath(path)
    if not text.strip():
        raise PathNotFoundError(f"The {what} is an empty string.", hint="Give a folder or a hub id.")
    local, a_file, a_folder = look_up(text, what)
    if a_file:
        if subfolder:
            raise PathNotFoundError(f"{text} is a file; it has no subfolder {subfolder!r}.", hint=f"Give {text} alone.")
        return _single_file(local, text)
    if not a_folder:
        if isinstance(path, Path) or os.path.lexists(local) or not looks_like_hub_id(text):
            raise _missing(local, what)
        hub = {"cache_dir": cache_dir, "force_download": force_download}
        return _from_hub(text, revision, subfolder, token, local_files_only, what, patterns, hub)
    if not os.access(local, os.R_OK | os.X_OK):
        raise SourceError(f"The {what} {text} cannot be read: Permission denied.", hint="Check its permissions.")
    if subfolder:
        inner = Source(local, text).path(subfolder)
        if not is_folder(inner):
            raise PathNotFoundError(f"{text} has no subfolder {subfolder!r}.", hint=_near(inner))
        return Source(inner, f"{text.rstrip('/')}/{subfolder}")
    return Source(local, text)


def looks_like_hub_id(text: str) -> bool:
    """Whether ``text`` can be ``name`` or ``owner/name`` on the hub, and is not plainly meant as a path."""
    plain = not any(part in text for part in _NOT_IN_HUB_ID) and not text.endswith(_NOT_HUB_ENDINGS)
    return plain and _HUB_ID.fullmatch(text) is not None


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    on = {"1", "true", "yes", "on"}
    return any(os.environ.get(name, "").lower() in on for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def exists(path: Path) -> bool:
    """Whether something is at ``path``; not where the system cannot even say, as of a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file is at ``path``, with the same answer for what no path can be."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is at ``path``, likewise."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def look_up(text: str, what: str) -> tuple[Path, bool, bool]:
    """A path, whether it is a file, and whether it is a folder.

    Raises:
        PathNotFoundError: the system cannot even say that.
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
    if path.suffix != SAFETENSORS:
        kinds = [suffix for names in PICKLES.values() for name in names for suffix in [Path(name).suffix]]
        if path.suffix in kinds and path.suffix != ".json":
            raise PickleRefusedError(
                f"{text} is a pickle, which can run code; it is not opened.",
                hint=f"If you trust it: veneer convert-pickle {text}",
            )
        raise NotACheckpointError(
            f"{text} is a file, and no safetensors file.", hint="Give a checkpoint's folder, or its .safetensors file."
        )
    read_header(path)
    return Source(path.parent, text, file=path)


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
    return PathNotFoundError(f"The {what} {str(path)!r} does not exist.", hint=_near(path))


def _near(path: Path) -> str:
    """What stands beside a path that does not exist."""
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


def _from_hub(
    repo: str,
    revision: str | None,
    subfolder: str | None,
    token: str | None,
    local_files_only: bool,
    what: str,
    patterns: Sequence[str],
    hub: Mapping[str, Any],
) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    prefix = f"{Source(Path(), repo).path(subfolder).as_posix()}/" if subfolder else ""
    wanted = [prefix + pattern for pattern in patterns]
    # With a folder ``owner`` here, ``owner/name`` is a path with a slip in it, and the hub need not hear of it.
    slip = "/" in repo and is_folder(Path(repo).parent)
    offline = local_files_only or is_offline() or slip
    cached: str | None = None
    where: dict[str, Any] = {"revision": revision, "allow_patterns": wanted, "cache_dir": hub["cache_dir"]}
    with contextlib.suppress(LocalEntryNotFoundError):
        cached = snapshot_download(repo, local_files_only=True, **where)
    folder = cached
    again = hub["force_download"]
    if not offline and (again or cached is None or not _is_complete(Path(cached) / prefix, patterns)):
        try:
            folder = snapshot_download(repo, token=token, force_download=again, **where)
        except GatedRepoError as error:
            raise SourceError(
                f"The {what} {repo} is gated on the hub.", hint="Accept its terms there, then pass token=."
            ) from error
        except RepositoryNotFoundError as error:
            raise PathNotFoundError(
                f"The {what} {repo!r} is neither a local path nor a public repository on the hub.",
                hint="Check the spelling; for a private one pass token=.",
            ) from error
        except (OSError, ValueError) as error:
            # What is in the cache is worth more than no answer; what is missing from it will be said.
            if cached is None:
                raise _unreachable(repo, what, error) from error
    if folder is None:
        raise _not_cached(repo, revision, what, slip)
    root = Path(folder) / prefix
    if not is_folder(root):
        raise PathNotFoundError(f"{repo} has no subfolder {subfolder!r}.", hint="Check its spelling.")
    return Source(root, repo + (f"/{subfolder}" if subfolder else ""), revision=revision, commit=Path(folder).name)


def _is_complete(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether the cache's copy holds what is wanted; one that was fetched for its configs alone has no weights."""
    weights = any(pattern.endswith(SAFETENSORS) for pattern in patterns)
    return folder.is_dir() and any(folder.glob(f"*{SAFETENSORS}" if weights else "*.json"))


def _not_cached(repo: str, revision: str | None, what: str, slip: bool) -> PathNotFoundError:
    if slip:
        return PathNotFoundError(
            f"The {what} {repo!r} does not exist, and the hub's cache holds no repository of that name.",
            hint=f"{_near(Path(repo))} If the hub's is meant: hf download {repo}",
        )
    return PathNotFoundError(
        f"The {what} {repo!r}{f' at {revision!r}' if revision else ''} is neither a local path nor in the hub's "
        "cache, and the network is switched off.",
        hint="Download it first, or give a local path.",
    )


def _unreachable(repo: str, what: str, error: Exception) -> SourceError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return PathNotFoundError(
        f"The {what} {repo!r} is neither a local path nor in the hub's cache, and the hub did not answer: {reason}",
        hint="Check the spelling of the path, or the network.",
    )


# -- reading -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ``CorruptFileError`` that says where it breaks."""
    try:
        size = path.stat().st_size
        if size > _MAX_HEADER:
            raise CorruptFileError(f"{path}: {size:,} bytes are too many for a file of JSON.", hint="Check the file.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CorruptFileError(
            f"{path}: no valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.",
            hint=_AGAIN if error.doc else "The file is empty; copy or download it again.",
        ) from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: not UTF-8 text.", hint=_AGAIN) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise CorruptFileError(f"{path}: its JSON cannot be read: {error}.", hint=_AGAIN) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{path}: holds a {type(values).__name__}, not a JSON object.", hint="Check the file.")
    return values


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size.

    It is as strict as the reader that the values come from later: what passes here opens there.

    Raises:
        CorruptFileError: not a safetensors file, truncated, or with a header that contradicts itself.
        SourceError: the file cannot be opened.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_start(path, start, length, size, file.read(64))
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        tensors, metadata, end = _described(raw)
        _check_extent(end, size - 8 - length)
    except _DamagedError as error:
        raise CorruptFileError(f"{path} is damaged: {error}.", hint=_AGAIN) from error
    return Header(path, tensors, metadata, 8 + length)


def header_in(raw: bytes, path: Path) -> Header:
    """The header that ``raw`` is, its length included, of a file whose data are still to be written to ``path``.

    Raises:
        CorruptFileError: it is none, or contradicts itself.
    """
    try:
        if int.from_bytes(raw[:8], "little") != len(raw) - 8:
            raise _DamagedError("its header has another length than it says")
        tensors, metadata, _ = _described(raw[8:])
    except _DamagedError as error:
        raise CorruptFileError(f"{path} cannot be written: {error}.", hint=_AGAIN) from error
    return Header(path, tensors, metadata, len(raw))


class _DamagedError(Exception):
    """What is wrong with a header."""


# Adapters of one training script have one header, byte by byte: it is read once.
@lru_cache(maxsize=8)
def _described(raw: bytes) -> tuple[Mapping[str, TensorInfo], Mapping[str, str], int]:
    """The tensors and the metadata of a header, and the bytes that the tensors take."""
    try:
        text = raw.decode("utf-8")  # left to itself, json also takes UTF-16 and -32
        values = json.loads(text, object_pairs_hook=_unique, parse_int=_number, parse_constant=_number)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise _DamagedError("its header is no valid JSON") from error
    if not isinstance(values, dict):
        raise _DamagedError("its header is no JSON object")
    if not text.startswith("{"):
        raise _DamagedError("its header does not begin with a brace")
    metadata = values.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _DamagedError("its __metadata__ must map names to strings")
    tensors = {name: _tensor(name, value) for name, value in values.items()}
    return tensors, metadata, _extent(tensors)


def _check_start(path: Path, start: bytes, length: int, size: int, after: bytes) -> None:
    text = (start + after).lstrip()
    if text.startswith(b"version https://git-lfs"):
        raise CorruptFileError(f"{path}: a Git LFS pointer, not the weights.", hint="Run git lfs pull in its folder.")
    if text[:1] == b"<" and (b"<html" in text.lower() or text.lower().startswith(b"<!doctype")):
        raise CorruptFileError(f"{path}: a web page, not weights.", hint="The download failed; download it again.")
    if size < 8:
        raise CorruptFileError(f"{path} is damaged: it has {size} bytes, and a header alone takes 8.", hint=_AGAIN)
    if length > min(size - 8, _MAX_HEADER):
        raise CorruptFileError(
            f"{path} is damaged: its header would take {length:,} bytes, and the file has {size:,}: truncated, or no "
            "safetensors.",
            hint=_AGAIN,
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _DamagedError("its header names a tensor twice")
    return values


def _number(text: str) -> int:
    """A number as it may stand in a header: no ``-0``, no ``NaN``."""
    if text in ("-0", "NaN", "Infinity", "-Infinity"):
        raise ValueError(text)
    return int(text)


def _tensor(name: str, value: Any) -> TensorInfo:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _DamagedError(f"its header does not describe {name!r}") from error
    # A bool is an int to Python, and a string of digits a sequence.
    whole = isinstance(shape, list) and all(type(n) is int and n < _MAX_NUMBER for n in (*shape, start, end))
    if not whole or not isinstance(dtype, str):
        raise _DamagedError(f"its header does not describe {name!r}")
    if any(isinstance(more, (dict, list)) for key, more in value.items() if key not in ("shape", "data_offsets")):
        raise _DamagedError(f"its header says more of {name!r} than a reader expects")
    info = TensorInfo(name, dtype, tuple(shape), start, end)
    if dtype not in DTYPE_BITS:
        raise _DamagedError(f"its header gives {name!r} the dtype {dtype!r}, which is none of safetensors'")
    if any(product >= _MAX_NUMBER for product in accumulate(shape, operator.mul)):
        raise _DamagedError(f"its header gives {name!r} the shape {shape}, which no computer holds")
    if min((*shape, start, end - start)) < 0 or info.nbytes * 8 != info.numel * DTYPE_BITS[dtype]:
        raise _DamagedError(f"its header gives {name!r} {info.nbytes} bytes for shape {shape} of {dtype}")
    return info


def _extent(tensors: Mapping[str, TensorInfo]) -> int:
    """The bytes of all tensors, which lie side by side: no overlap, no hole."""
    position = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            what = "overlaps another tensor's" if info.start < position else "leaves a hole before it"
            raise _DamagedError(f"the data of {info.name!r} {what}")
        position = info.end
    return position


def _check_extent(end: int, available: int) -> None:
    """The tensors fill the data part: nothing missing, nothing left over."""
    if end != available:
        cut = "truncated: " if end > available else ""
        raise _DamagedError(f"{cut}its tensors take {end:,} bytes, and {available:,} are there")


def _unreadable(path: Path, error: OSError) -> SourceError:
    kind = PathNotFoundError if isinstance(error, FileNotFoundError) else SourceError
    return kind(f"{path} cannot be read: {error.strerror or error}.", hint="Check the path and its permissions.")


def read_headers(source: Source, stem: str) -> list[Header]:
    """The headers of a checkpoint's safetensors files, in the files' order.

    Args:
        source: where.
        stem: ``"model"`` or ``"adapter_model"``.

    Raises:
        CorruptFileError: a file is damaged, or shards and index contradict each other. SourceError: see
            :func:`weight_files`.
    """
    headers = [read_header(path) for path in weight_files(source, stem)]
    check_shards(source, stem, headers)
    return headers


def check_shards(source: Source, stem: str, headers: Sequence[Header]) -> None:
    """Raise ``CorruptFileError`` when a tensor is in two shards, or the index says other than their headers."""
    homes: dict[str, Path] = {}
    for header in headers:
        for name in header.tensors:
            if name in homes:
                raise CorruptFileError(
                    f"{source.origin}: {name} is in two files, {homes[name].name} and {header.path.name}.", hint=_AGAIN
                )
            homes[name] = header.path
    if source.file is None and not source.has(stem + SAFETENSORS):
        _check_index(source, stem + INDEX, homes)


def _check_index(source: Source, index: str, homes: Mapping[str, Path]) -> None:
    mapping = source.json(index)["weight_map"]
    paths = {name: source.path(str(file)) for name, file in mapping.items()}
    odd = [name for name in paths.keys() | homes.keys() if paths.get(name) != homes.get(name)]
    if odd:
        name = min(odd)
        said = f"in {mapping[name]}" if name in mapping else "nowhere"
        found = f"in {homes[name].relative_to(source.root)}" if name in homes else "in no file"
        more = f", and {len(odd) - 1} more alike" if len(odd) > 1 else ""
        raise CorruptFileError(
            f"{source.origin}/{index} has {name} {said}, and it is {found}{more}.",
            hint="Copy or download index and shards again.",
        )


def weight_files(source: Source, stem: str) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that an index names.

    Args:
        source: where.
        stem: ``"model"`` or ``"adapter_model"``.

    Raises:
        IncompleteCheckpointError: there are none, or a shard is missing. PickleRefusedError: only pickles.
    """
    if source.file is not None:
        return [source.file]
    if source.has(stem + SAFETENSORS):
        return [source.path(stem + SAFETENSORS)]
    if source.has(stem + INDEX):
        return shards(source, stem + INDEX)
    pickles = [name for name in PICKLES[stem] if source.has(name)]
    if pickles:
        raise PickleRefusedError(
            f"{source.origin}: the weights are there only as a pickle ({pickles[0]}), which can run code.",
            hint=f"If you trust it: veneer convert-pickle {source.origin}",
        )
    raise IncompleteCheckpointError(
        f"{source.origin}: there is a config and no weights ({stem}{SAFETENSORS}).",
        hint="Copy the weights there; a training run that was cut off may not have saved them.",
    )


def shards(source: Source, index: str) -> list[Path]:
    """The files that an index names, sorted by name.

    Raises:
        CorruptFileError: the index names none, or one outside of its folder.
        IncompleteCheckpointError: files are missing.
    """
    mapping = source.json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CorruptFileError(f"{source.origin}/{index}: has no weight_map.", hint=_AGAIN)
    names = sorted({str(name) for name in mapping.values()})
    missing = [name for name in names if not source.has(name)]
    if missing:
        raise IncompleteCheckpointError(
            f"{source.origin}/{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}.",
            hint="Copy or download them again.",
        )
    return [source.path(name) for name in names]
