"""What an adapter means for one layer: a change to its weight, applied or merged.

For a layer ``y = W x + b`` a patch is a change of ``W`` to ``W' = W + scale * U V``, with ``U`` of shape
``(out, r)`` and ``V`` of shape ``(r, in)``. A method lowers its tensors to this; everything else (the layer, the
merge, the mixed batch) knows only patches. Several patches on one layer add up, in the order of the selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Patch:
    """A low-rank change of a weight.

    Attributes:
        up: ``U``, shape ``(out, r)``.
        down: ``V``, shape ``(r, in)``.
        scale: multiplies ``U V``.
        dropout: share of the input that is dropped while training.
    """

    up: Tensor
    down: Tensor
    scale: float
    dropout: float = 0.0

    def shift(self, x: Tensor, training: bool) -> Tensor:
        """What the patch adds to the output for the input ``x`` of shape ``(..., in)``: shape ``(..., out)``.

        Computed in the wider of the input's and the patch's dtype, so that neither is rounded first.
        """
        dtype = torch.promote_types(x.dtype, self.up.dtype)
        if training and self.dropout:
            x = F.dropout(x, self.dropout)
        hidden = F.linear(x.to(dtype), self.down.to(dtype))
        return F.linear(hidden, self.up.to(dtype)) * self.scale

    def add_to_weight(self, rows: Tensor, start: int, stop: int) -> None:
        """Add the change to float32 ``rows``, the rows ``start:stop`` of a canonical weight, in place."""
        rows.addmm_(self.up[start:stop].float(), self.down.float(), alpha=self.scale)

    def changes(self) -> bool:
        """Whether the patch changes anything: false for a freshly made or an all-zero adapter."""
        return self.scale != 0 and bool(self.up.count_nonzero()) and bool(self.down.count_nonzero())


def apply(y: Tensor, x: Tensor, patches: Sequence[Patch], training: bool) -> Tensor:
    """The layer's output under ``patches``: base output ``y`` plus each one's shift, rounded once to ``y``'s dtype."""
    total = y
    for patch in patches:
        total = total + patch.shift(x, training)
    return total.to(y.dtype)


def apply_rows(
    y: Tensor, x: Tensor, groups: Mapping[str, Tensor], patches: Mapping[str, Patch], training: bool
) -> Tensor:
    """The same for a batch whose rows use different adapters.

    Args:
        y: base output, shape ``(rows, ..., out)``.
        x: the layer's input, shape ``(rows, ..., in)``.
        groups: adapter's name -> the indices of its rows, shape ``(n,)``, int64. Rows in no group keep ``y``.
        patches: adapter's name -> its patch here; a name without one changes nothing here.
        training: whether dropout is on.
    """
    for name, rows in groups.items():
        if name in patches:
            changed = y[rows] + patches[name].shift(x[rows], training)
            y = y.index_copy(0, rows, changed.to(y.dtype))
    return y
