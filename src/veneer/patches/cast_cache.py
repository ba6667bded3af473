"""Casts a layer's input to the dtype of its adapter's products, once for all layers that are given the same one."""

from __future__ import annotations

import torch
from torch import Tensor

# A decoding step's input. Casting a larger one costs little beside the products, and it is too large to be kept.
MAX_CACHED_VALUES = 1 << 16


class CastCache:
    """Keeps the last input that was cast, so that q, k and v, or gate and up, cast theirs once.

    It saves 3 us of 35 a layer in bfloat16: benchmarks/notes.md, Unmerged forward.

    An input is known by being the same object at the same version. Tensors of inference mode have no versions, and are
    cast each time: nothing would tell that one was changed in place. Threads may share a cache: its one entry is
    replaced whole.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def cast_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``x``, shape ``(..., in)``, as ``(rows, in)`` in ``dtype``."""
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version and last[2].dtype is dtype:
            return last[2]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        if x.dtype is not dtype and x.numel() <= MAX_CACHED_VALUES and not x.is_inference():
            self._last = x, x._version, rows
        return rows
