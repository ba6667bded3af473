"""Lays out the output's weight files before a byte is written: which tensor lies where."""

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
class PlannedTensor:
    """A tensor that will be written, and the base's file whose other tensors it joins."""

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
class OutputFile:
    """One weight file of the output: its header's bytes, and its tensors in order."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors.values())

    def start(self, name: str) -> int:
        """Return the position of a tensor's first byte in the file."""
        return len(self.header) + self.tensors[name].start


def lay_out(
    tensors: Sequence[PlannedTensor], metadata: Mapping[str, Mapping[str, str]], limit: int | None
) -> list[OutputFile]:
    """Divide tensors into the output's files.

    Args:
        tensors: in the base's order.
        metadata: file of the base -> the metadata of its header.
        limit: bytes of tensors that a file may hold; ``None`` keeps the base's division.
    """
    groups = _by_file(tensors) if limit is None else _divided(tensors, limit)
    common: dict[str, str] = {}
    for values in metadata.values():
        common.update(values)
    return [
        _out_file(name, group, metadata.get(base_file, common))
        for name, (base_file, group) in zip(_names(list(groups)), groups.items(), strict=True)
    ]


def _by_file(tensors: Sequence[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.file, []).append(tensor)
    return groups


def _names(base_files: Sequence[str]) -> list[str]:
    """Name the output's files: as the base's, where these lie in one folder.

    A single file has the usual name, by which it is found: the base may call it otherwise and have an index.
    """
    count = len(base_files)
    if count == 1:
        return [f"model{SAFETENSORS}"]
    if any("/" in name for name in base_files):
        return [f"model-{i:05d}-of-{count:05d}{SAFETENSORS}" for i in range(1, count + 1)]
    return list(base_files)


def _divided(tensors: Sequence[PlannedTensor], limit: int) -> dict[str, list[PlannedTensor]]:
    """Put as many tensors into each file as fit; one that is larger than the limit gets a file of its own."""
    parts: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return {f"part/{number}": part for number, part in enumerate(parts)}


def _out_file(name: str, planned: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> OutputFile:
    # Wider dtypes first, so that each tensor begins at a multiple of its values' size; else as they come.
    ordered = sorted(planned, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        tensors[tensor.name] = TensorInfo(tensor.name, tensor.dtype, tensor.shape, position, end)
        position = end
    return OutputFile(name, _header(tensors, metadata), tensors)


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    values: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for name, info in tensors.items():
        values[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(files: Sequence[OutputFile], metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the index that names each tensor's file; ``None`` for a single file, which needs none."""
    if len(files) == 1:
        return None
    infos = [info for file in files for info in file.tensors.values()]
    values = {**metadata, "total_size": sum(info.nbytes for info in infos)}
    if "total_parameters" in values:
        values["total_parameters"] = sum(info.numel for info in infos)
    file_of = {name: file.name for file in files for name in file.tensors}
    return {"metadata": values, "weight_map": dict(sorted(file_of.items()))}


def size_in_bytes(text: str | int) -> int:
    """Return the bytes that ``"5GB"``, ``"500MiB"`` or a number of bytes means."""
    size = parse_bytes(str(text))
    if size is None:
        raise UsageError(f"{text!r} is no size.", hint='Give one such as "5GB" or "500MiB".')
    return size
