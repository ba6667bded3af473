"""The input of a layer in the dtype of its adapter's products, kept for the layers that are given the same one."""

from __future__ import annotations

import torch
from torch import Tensor

# A decoding step's input. Beyond it the conversion is small beside the products, and too large to be kept.
MAX_CACHED_VALUES = 1 << 16


class CastCache:
    """Keeps the last input that was converted, so that q, k and v, or gate and up, convert theirs once.

    It saves 3 us of 35 a layer in bfloat16: benchmarks/notes.md, Unmerged forward.

    Known by being the same object at the same version. Tensors of inference mode have no versions, and are converted
    each time: nothing would tell that one was changed in place. Threads may share it: what is kept is replaced whole.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` of shape ``(..., in)`` as ``(rows, in)`` in ``dtype``."""
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version and last[2].dtype is dtype:
            return last[2]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        if x.dtype is not dtype and x.numel() <= MAX_CACHED_VALUES and not x.is_inference():
            self._last = x, x._version, rows
        return rows
