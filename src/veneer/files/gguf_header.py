"""Reads and checks the header of a GGUF file, without torch, numpy or the package gguf."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError
from veneer.files.json_file import COPY_AGAIN, unreadable

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_KEY = 1 << 16
# Longer arrays are a model's vocabulary, of which no adapter has one; they are stepped over.
_LONGEST_ARRAY = 1 << 16
_STRING, _ARRAY = 8, 9
# The number of a type -> its code in :mod:`struct`.
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


# The number of a tensor's type in ggml -> its name, and the values and bytes of a block, of those that adapters have.
_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor in a header.

    Attributes:
        name: its name.
        shape: its shape, as numpy has it: the last dimension is that of a row.
        kind: the number of its type in ggml.
        start: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def dtype(self) -> str:
        """The name of its type."""
        return _TYPES[self.kind][0] if self.kind in _TYPES else f"ggml type {self.kind}"

    @property
    def least_end(self) -> int:
        """The byte behind its last; behind its first where its type is not known."""
        _, values, nbytes = _TYPES.get(self.kind, ("", 0, 1))
        return self.start + (math.prod(self.shape) // values * nbytes if values else nbytes)


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file without its data: its values by key, and its tensors by name. Long arrays are left out."""

    path: Path
    size: int
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Tell by its first bytes whether a file is a GGUF file.

    Raises:
        SourceError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise unreadable(path, error) from error


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, and check its numbers against the file's size before anything is made of them.

    Raises:
        CorruptFileError: no GGUF file, truncated, or with a header that contradicts itself.
        SourceError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _DamagedGgufError("it does not begin as a GGUF file does")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, _Cursor(data, len(MAGIC)))
    except _DamagedGgufError as error:
        raise CorruptFileError(f"{path} is damaged: {error}.", hint=COPY_AGAIN) from error
    except OSError as error:
        raise unreadable(path, error) from error


class _DamagedGgufError(Exception):
    """A header is damaged; the message tells how."""


class _Cursor:
    """Reads values one after the other, and never beyond the end of the file."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    @property
    def left(self) -> int:
        """The bytes that are left."""
        return len(self.data) - self.offset

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """Read numbers by their code in :mod:`struct`."""
        start = self.skip(struct.calcsize(f"<{code}") * count)
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def number(self, code: str) -> Any:
        """Read one number."""
        return self.numbers(code)[0]

    def skip(self, length: int) -> int:
        """Step over bytes, and return where they begin."""
        if length > self.left:
            raise _DamagedGgufError("its header is cut off, or counts more than the file holds")
        self.offset += length
        return self.offset - length

    def text(self, longest: int | None = None) -> str:
        """Read a text with its length."""
        length = self.number("Q")
        if longest is not None and length > longest:
            raise _DamagedGgufError(f"its header has a name of {length:,} bytes")
        start = self.skip(length)
        try:
            return self.data[start : self.offset].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedGgufError("its header has text that is no UTF-8") from error

    def count(self, smallest: int, what: str) -> int:
        """Read how many things of at least ``smallest`` bytes follow."""
        count = int(self.number("Q"))
        if count * smallest > self.left:
            raise _DamagedGgufError(f"its header counts {count:,} {what}, more than the file can hold")
        return count


def _read(path: Path, cursor: _Cursor) -> GgufHeader:
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = struct.pack(">I", version) in (struct.pack("<I", known) for known in _VERSIONS)
        what = (
            "it is written for big-endian machines" if swapped else f"its version is {version}, and 2 and 3 are known"
        )
        raise _DamagedGgufError(what)
    tensors = cursor.count(24, "tensors")
    values: dict[str, Any] = {}
    for _ in range(cursor.count(13, "values")):
        key = cursor.text(_LONGEST_KEY)
        if key in values:
            raise _DamagedGgufError(f"its header has the key {key!r} twice")
        values[key] = _value(cursor, cursor.number("I"))
    described = [_tensor(cursor) for _ in range(tensors)]
    return GgufHeader(path, len(cursor.data), values, _placed(described, cursor, values.get("general.alignment", 32)))


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, cursor.number("I"))
    if kind not in _SCALARS:
        raise _DamagedGgufError(f"its header has a value of the unknown type {kind}")
    return cursor.number(_SCALARS[kind])


def _array(cursor: _Cursor, kind: int) -> tuple[Any, ...] | None:
    """Read an array; ``None`` for a long one and for one of texts."""
    if kind == _STRING:
        for _ in range(cursor.count(8, "texts")):
            cursor.skip(cursor.number("Q"))
        return None
    if kind not in _SCALARS:
        raise _DamagedGgufError(f"its header has an array of the unknown type {kind}")
    size = struct.calcsize(f"<{_SCALARS[kind]}")
    count = cursor.count(size, "numbers")
    if count <= _LONGEST_ARRAY:
        return cursor.numbers(_SCALARS[kind], count)
    cursor.skip(count * size)
    return None


def _tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.text(_LONGEST_KEY)
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise _DamagedGgufError(f"its header gives {name!r} {dimensions} dimensions")
    shape = cursor.numbers("Q", dimensions)
    if math.prod(shape) >= 1 << 63 or 0 in shape:
        raise _DamagedGgufError(f"its header gives {name!r} the shape {shape[::-1]}")
    return GgufTensor(name, shape[::-1], cursor.number("I"), cursor.number("Q"))


def _placed(tensors: list[GgufTensor], cursor: _Cursor, alignment: Any) -> dict[str, GgufTensor]:
    """Return the tensors by name, each with its place in the file."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedGgufError(f"its alignment is {alignment!r}, no power of two")
    data_start = -(-cursor.offset // alignment) * alignment
    placed = {t.name: GgufTensor(t.name, t.shape, t.kind, data_start + t.start) for t in tensors}
    if len(placed) != len(tensors):
        raise _DamagedGgufError("its header names a tensor twice")
    outside = [t for t in placed.values() if t.least_end > len(cursor.data)]
    if outside:
        where = "begins" if outside[0].start >= len(cursor.data) else "ends"
        raise _DamagedGgufError(f"its data are cut off: {outside[0].name!r} {where} behind its end")
    return placed
