"""Mixing adapters of one layer token by token, as Arrow and X-LoRA do.

    added = sum_i w_i(token) * scale_i * U_i V_i x

The adapters, *experts*, are on the model under names of their own and stay what they are. The one that mixes them has
a config that names them (``experts``), and a patch with a route on every layer that one of them adapts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.base_model.sites.site import Site
from veneer.methods.base.method import BaseLayer
from veneer.patches.patch import Patch


class LiveLayer(BaseLayer, Protocol):
    """Gives a live layer, to which other adapters are bound."""

    def here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of ``names`` that are bound to it."""
        ...

    def patches(self, names: Sequence[str]) -> list[Patch]:
        """Return the patches of adapters that are bound to it."""
        ...


def weighted_sum(site: Site, experts: Sequence[Patch], weights: Tensor, x: Tensor, training: bool) -> Tensor:
    """Return what experts add to a layer's output.

    Args:
        site: the layer.
        experts: low-rank patches, which may have different ranks.
        weights: of each expert at each token, shape ``(..., experts)``.
        x: the layer's input, shape ``(..., in)``; token ids, shape ``(...)``, of an embedding.
        training: whether dropout is on.
    """
    added = [
        _weighed(site, patch, weight, x, training) for patch, weight in zip(experts, weights.unbind(-1), strict=True)
    ]
    return torch.stack(added).sum(0)


def _weighed(site: Site, patch: Patch, weight: Tensor, x: Tensor, training: bool) -> Tensor:
    assert patch.up is not None
    assert patch.down is not None
    dtype = patch.down.dtype
    if x.is_floating_point():
        dtype = torch.promote_types(x.dtype, dtype)
        x = F.dropout(x.to(dtype), patch.dropout, training)
    hidden = site.product(x, patch.down.to(dtype)) * weight.unsqueeze(-1).to(dtype)
    return site.mix(hidden, patch.up.to(dtype)) * patch.scale


def low_rank_patches(layer: LiveLayer, names: tuple[str, ...]) -> list[Patch]:
    """Return the low-rank patch of each expert that is bound to a layer."""
    return [patch for patch in layer.patches(names) if patch.low_rank]
