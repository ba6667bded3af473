"""The lengths of a weight's rows under a low-rank change, by which DoRA divides, without forming the sum.

    ||w + s u V||^2 = ||w||^2 + s u . (2 V w + s V V^T u)        w: a row of W, u: its row of U

``V w`` is one product with the weight. Rows that the change all but cancels are measured themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.patches.weight_arithmetic import BLOCK, row_blocks

# Squares below this share of the weight's have lost digits.
_CANCELLED = 0.1


class RowLengths:
    """Measures the rows of one layer, and keeps what it needs again in entries that are replaced whole, for threads.

    The squares of a frozen weight's rows are kept until it is replaced or changed in place. The lengths are kept on a
    CPU while U and V are trained, with copies of both to compare with: a step may call a layer several times, and many
    optimizers write parameters without a trace.
    """

    def __init__(self) -> None:
        self._squares: tuple[_Version, Tensor] | None = None
        self._lengths: _Lengths | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RowLengths, ()

    @torch.no_grad()
    def of(self, weight: Tensor, frozen: bool, up: Tensor, down: Tensor, scale: float) -> Tensor:
        """Return the length of each row in a training step, shape ``(out,)``, float32.

        Args:
            weight: canonical, shape ``(out, in)``.
            frozen: whether it is not trained.
            up: ``U``, on the same device.
            down: ``V``.
            scale: ``s``.
        """
        version = _Version.of(weight) if frozen and not weight.is_inference() else None
        known = self._lengths
        if version is not None and known is not None and known.fit(version, up, down, scale):
            return known.lengths
        lengths = self._computed(weight, version, up.float(), down.float(), scale)
        if version is not None and weight.device.type == "cpu":
            self._lengths = _Lengths(version, up.clone(), down.clone(), scale, lengths)
        return lengths

    def _computed(self, weight: Tensor, version: _Version | None, up: Tensor, down: Tensor, scale: float) -> Tensor:
        known = self._squares
        squares = known[1] if known is not None and known[0] == version else None
        products, new_squares = [], []
        for start, stop in row_blocks(len(weight), BLOCK):
            rows = weight[start:stop].float()
            products.append(rows @ down.t())
            if squares is None:
                new_squares.append(rows.square().sum(1))
        if squares is None:
            squares = torch.cat(new_squares)
            self._squares = None if version is None else (version, squares)
        changes = scale * (up * (2 * torch.cat(products) + scale * (up @ (down @ down.t())))).sum(1)
        lengths = (squares + changes).clamp_min(0).sqrt()
        cancelled = squares + changes < _CANCELLED * squares
        if bool(cancelled.any()):
            lengths[cancelled] = row_lengths(weight[cancelled], up[cancelled], down, scale)
        return lengths


@dataclass(frozen=True, eq=False)
class _Version:
    """Identifies the values of a tensor until they are changed in place or freed."""

    storage: StorageWeakRef
    place: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Version:
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        return cls(StorageWeakRef(tensor.untyped_storage()), place)

    def __eq__(self, other: object) -> bool:
        # The weak reference keeps the storage's address from being used again.
        return isinstance(other, _Version) and self.storage == other.storage and self.place == other.place


@dataclass(frozen=True)
class _Lengths:
    """Holds lengths, and what they were computed from."""

    version: _Version
    up: Tensor
    down: Tensor
    scale: float
    lengths: Tensor

    def fit(self, version: _Version, up: Tensor, down: Tensor, scale: float) -> bool:
        """Tell whether they are those of these values."""
        return (
            self.version == version
            and self.scale == scale
            and self.up.dtype == up.dtype
            and self.down.dtype == down.dtype
            and torch.equal(self.up, up)
            and torch.equal(self.down, down)
        )


def row_lengths(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return the lengths from the rows themselves, without a look at any value."""
    up, down = up.float(), down.float()
    blocks = row_blocks(len(weight), BLOCK)
    # Not in place, which the transforms of torch.func do not allow.
    return torch.cat([(weight[a:b].float() + scale * (up[a:b] @ down)).norm(dim=1) for a, b in blocks])
