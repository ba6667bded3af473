"""Reads and checks the header of a safetensors file, without torch."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError
from veneer.files.json_file import COPY_AGAIN, unreadable
from veneer.files.names import DTYPE_BITS, MAX_HEADER

_MAX_NUMBER = 1 << 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a header; ``start`` and ``end`` are its bytes in the file's data part."""

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


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check it against the file's size.

    It is as strict as safetensors itself, which reads the values later: a file that passes here opens there.

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
        raise unreadable(path, error) from error
    try:
        tensors, metadata, end = _described(raw)
        _check_extent(end, size - 8 - length)
    except _DamagedError as error:
        raise CorruptFileError(f"{path} is damaged: {error}.", hint=COPY_AGAIN) from error
    return Header(path, tensors, metadata, 8 + length)


def header_in(raw: bytes, path: Path) -> Header:
    """Parse the bytes of a header, its length included, of a file whose data are still to be written to ``path``.

    Raises:
        CorruptFileError: it is no header, or contradicts itself.
    """
    try:
        if int.from_bytes(raw[:8], "little") != len(raw) - 8:
            raise _DamagedError("its header has another length than it says")
        tensors, metadata, _ = _described(raw[8:])
    except _DamagedError as error:
        raise CorruptFileError(f"{path} cannot be written: {error}.", hint=COPY_AGAIN) from error
    return Header(path, tensors, metadata, len(raw))


class _DamagedError(Exception):
    """A header is damaged; the message tells how."""


# Adapters of one training script have one header, byte by byte: it is read once.
@lru_cache(maxsize=8)
def _described(raw: bytes) -> tuple[Mapping[str, TensorInfo], Mapping[str, str], int]:
    """Parse a header: its tensors, its metadata, and the bytes that the tensors take."""
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
        raise CorruptFileError(f"{path} is damaged: it has {size} bytes, and a header alone takes 8.", hint=COPY_AGAIN)
    if length > min(size - 8, MAX_HEADER):
        raise CorruptFileError(
            f"{path} is damaged: its header would take {length:,} bytes, and the file has {size:,}: truncated, or no "
            "safetensors.",
            hint=COPY_AGAIN,
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _DamagedError("its header names a tensor twice")
    return values


def _number(text: str) -> int:
    """Parse a number that a header may hold: no ``-0``, no ``NaN``."""
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
    """Return the bytes of all tensors, and check that they lie side by side: no overlap, no hole."""
    position = 0
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            what = "overlaps another tensor's" if info.start < position else "leaves a hole before it"
            raise _DamagedError(f"the data of {info.name!r} {what}")
        position = info.end
    return position


def _check_extent(end: int, available: int) -> None:
    """Check that the tensors fill the data part: nothing missing, nothing left over."""
    if end != available:
        cut = "truncated: " if end > available else ""
        raise _DamagedError(f"{cut}its tensors take {end:,} bytes, and {available:,} are there")
