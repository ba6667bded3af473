"""What the output's weight files look like: which tensor lies where, known before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import UsageError
from veneer.files.names import DTYPE_BITS, SAFETENSORS
from veneer.files.safetensors_header import TensorInfo
from veneer.printing import parse_bytes


@dataclass(frozen=True)
class Wanted:
    """A tensor that is to be written, and the base's file that it belongs with."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        values = 1
        for size in self.shape:
            values *= size
        return values * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class OutFile:
    """One weight file of the output: its header's bytes, and the tensors in the order in which they follow."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors.values())

    def start(self, name: str) -> int:
        """The first byte of a tensor in the file."""
        return len(self.header) + self.tensors[name].start


def lay_out(wanted: Sequence[Wanted], metadata: Mapping[str, Mapping[str, str]], limit: int | None) -> list[OutFile]:
    """The output's files.

    Args:
        wanted: the tensors, in the base's order.
        metadata: file of the base -> its header's own.
        limit: bytes of tensors that a file may hold; ``None`` keeps the base's division.
    """
    groups = _by_file(wanted) if limit is None else _divided(wanted, limit)
    common: dict[str, str] = {}
    for values in metadata.values():
        common.update(values)
    return [
        _out_file(name, tensors, metadata.get(own, common))
        for name, (own, tensors) in zip(_names(list(groups)), groups.items(), strict=True)
    ]


def _by_file(wanted: Sequence[Wanted]) -> dict[str, list[Wanted]]:
    groups: dict[str, list[Wanted]] = {}
    for tensor in wanted:
        groups.setdefault(tensor.file, []).append(tensor)
    return groups


def _names(own: Sequence[str]) -> list[str]:
    """The output's names for files that the base has as ``own``: the same, where they are alone in one folder.

    A single file is found by its name; the base may call its own otherwise (as the first of one shard) and index it.
    """
    count = len(own)
    if count == 1:
        return [f"model{SAFETENSORS}"]
    if any("/" in name for name in own):
        return [f"model-{i:05d}-of-{count:05d}{SAFETENSORS}" for i in range(1, count + 1)]
    return list(own)


def _divided(wanted: Sequence[Wanted], limit: int) -> dict[str, list[Wanted]]:
    """As many tensors into each file as fit; one that is larger than the limit gets a file of its own."""
    parts: list[list[Wanted]] = [[]]
    size = 0
    for tensor in wanted:
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return {f"part/{number}": part for number, part in enumerate(parts)}


def _out_file(name: str, wanted: Sequence[Wanted], metadata: Mapping[str, str]) -> OutFile:
    # Wider dtypes first, so that each tensor begins at a multiple of its values' size; else as they come.
    ordered = sorted(wanted, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        tensors[tensor.name] = TensorInfo(tensor.name, tensor.dtype, tensor.shape, position, end)
        position = end
    return OutFile(name, _header(tensors, metadata), tensors)


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    values: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for name, info in tensors.items():
        values[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(files: Sequence[OutFile], metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The index that names each tensor's file; ``None`` for a single file, which needs none."""
    if len(files) == 1:
        return None
    infos = [info for file in files for info in file.tensors.values()]
    own = {**metadata, "total_size": sum(info.nbytes for info in infos)}
    if "total_parameters" in own:
        own["total_parameters"] = sum(info.numel for info in infos)
    where = {name: file.name for file in files for name in file.tensors}
    return {"metadata": own, "weight_map": dict(sorted(where.items()))}


def size_in_bytes(text: str | int) -> int:
    """Return the bytes that ``"5GB"``, ``"500MiB"`` or a number of bytes means."""
    size = parse_bytes(str(text))
    if size is None:
        raise UsageError(f"{text!r} is no size.", hint='Give one such as "5GB" or "500MiB".')
    return size
