"""Copies many small tensors to a device in one piece, where each copy is waited for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Kernels read aligned vectors of up to so many bytes.
_ALIGNMENT = 16


def copied_in_one(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors of the CPU on a device: over one block of memory, and each with a version of its own."""
    places: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        places[name] = size
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(size, dtype=torch.uint8)
    for name, tensor in tensors.items():
        block[places[name] : places[name] + tensor.nbytes].copy_(tensor.contiguous().flatten().view(torch.uint8))
    storage = block.to(device).untyped_storage()
    return {name: _over(storage, places[name], tensor) for name, tensor in tensors.items()}


def _over(storage: torch.UntypedStorage, place: int, like: Tensor) -> Tensor:
    """Return a tensor of the dtype and shape of ``like`` over the bytes of a storage from ``place`` on."""
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    tensor: Tensor = empty.set_(storage, place // like.itemsize, like.shape)  # type: ignore[call-overload]
    return tensor
