"""The change that adapters make of a layer's weight, as one low-rank or dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import UnsupportedError
from veneer.layers.adapter_shares import LayerAdapters
from veneer.patches.patch import Patch, biases
from veneer.patches.weight_arithmetic import composed


@dataclass(frozen=True)
class WeightChange:
    """One adapter's change of one weight: ``up @ down`` where it is low-rank, else ``dense``; float32.

    Attributes:
        up: shape ``(..., out, r)``.
        down: shape ``(..., r, in)``.
        dense: shape ``(..., out, in)``.
        shift: the change of the bias, shape ``(out,)``.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    dense: Tensor | None = None
    shift: Tensor | None = None

    def whole(self) -> Tensor:
        """Return the change as a matrix."""
        if self.up is None or self.down is None:
            assert self.dense is not None
            return self.dense
        return self.up @ self.down


def change_of(layer: LayerAdapters, patches: Sequence[Patch]) -> WeightChange:
    """Return the change that patches make of a layer."""
    if layer.site.shift_only:
        raise UnsupportedError(
            f"The adapter's config sets bias: it trains the bias of {layer.site.name} alone, as no LoRA can.",
            hint='Combine adapters with bias="none".',
        )
    bias = biases(layer.base_bias, patches)
    before = 0.0 if bias[0] is None else bias[0]
    shift = None if bias[-1] is None or bias[-1] is bias[0] else bias[-1] - before
    if all(patch.only_adds for patch in patches):
        ups = [patch.scale * patch.up.float() for patch in patches if patch.up is not None]
        downs = [patch.down.float() for patch in patches if patch.down is not None]
        if ups:
            return WeightChange(torch.cat(ups, -1), torch.cat(downs, -2), shift=shift)
    weight = layer.base_weight().float()
    return WeightChange(dense=composed(weight, patches) - weight, shift=shift)
