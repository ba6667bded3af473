"""Maps a safetensors file into memory, so that each tensor is a view of it and nothing is copied.

The mapping is private: a tensor that is changed in place gets memory of its own, page by page, and the file stays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from veneer.errors import CorruptFileError
from veneer.files.safetensors_header import Header, TensorInfo
from veneer.files.torch_dtypes import DTYPES

if TYPE_CHECKING:
    from torch import Tensor


def read_mapped(header: Header, keys: Collection[str]) -> dict[str, Tensor]:
    """Return key -> tensor, in its dtype, for those of ``keys`` that the file holds.

    Raises:
        CorruptFileError: the file is shorter than its header says, or safetensors cannot read it.
    """
    infos = [info for name, info in header.tensors.items() if name in keys]
    if not infos:
        return {}
    if any(info.dtype not in DTYPES or (header.data_start + info.start) % _size(info) for info in infos):
        return _copied(header, infos)
    # 10.4 -> 1.6 ms a load against safe_open: benchmarks/notes.md, Attach.
    # One storage for all would make each tensor look changed when another is; each gets its own, over the same bytes.
    whole = _mapping(header).numpy()
    return {info.name: _view(whole, header.data_start, info) for info in infos}


def _size(info: TensorInfo) -> int:
    return DTYPES[info.dtype].itemsize


def _mapping(header: Header) -> Tensor:
    size = header.data_start + header.nbytes
    try:
        # torch closes the file again, where Python's mmap would keep a descriptor for each adapter.
        storage = torch.UntypedStorage.from_file(str(header.path), False, size)
    except RuntimeError as error:
        raise CorruptFileError(
            f"{header.path} cannot be mapped: {error}.", hint="Did it change while it was read? Copy it again."
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def _view(whole: object, start: int, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    if not info.nbytes:
        return torch.empty(info.shape, dtype=dtype)
    count = info.nbytes // dtype.itemsize
    return torch.frombuffer(whole, dtype=dtype, count=count, offset=start + info.start).view(info.shape)


def _copied(header: Header, infos: Collection[TensorInfo]) -> dict[str, Tensor]:
    """Read tensors by safetensors' own reader, which takes rare dtypes and unaligned data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(header.path, framework="pt") as file:
            return {info.name: file.get_tensor(info.name) for info in infos}
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{header.path} cannot be read: {error}.", hint="Copy or download it again.") from error
