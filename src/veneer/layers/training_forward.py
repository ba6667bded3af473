"""Keeps a layer's forward pass in training, under one plain low-rank adapter, in the fewest calls.

Between the products of a step whatever runs has been driven out of the processor's caches by the weights: finding the
patch anew took 200 us a layer, a quarter of that in a loop by itself. benchmarks/notes.md, A training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.patches.low_rank_autograd import LowRankUpdate
from veneer.patches.patch import Patch
from veneer.patches.plain_calls import is_captured, is_eager, is_plain, plain_linear
from veneer.patches.products import products
from veneer.patches.seeded_dropout import Dropout

if TYPE_CHECKING:
    from veneer.layers.adapted_layer import AdaptedLayer
    from veneer.patches.selection import Selection

# The place of a tensor: a holder by its name, the adapter's module in it, and the tensor by its name.
_Place = tuple[str, nn.Module, nn.Module, str, Tensor]


class TrainingForward:
    """Computes a layer as ``apply`` does under one patch that only adds the product of two parameters.

    Nothing that it holds is looked for again; each call sees that all of it is where it was.
    """

    __slots__ = (
        "_adapter",
        "_base",
        "_bias",
        "_down",
        "_dropped",
        "_dtype",
        "_layer",
        "_names",
        "_options",
        "_out",
        "_places",
        "_share",
        "_up",
        "_weight",
    )

    def __init__(
        self,
        layer: AdaptedLayer,
        selection: Selection,
        adapter: str,
        places: Sequence[_Place],
        base: nn.Linear,
        patch: Patch,
        x: Tensor,
    ) -> None:
        assert patch.up is not None
        assert patch.down is not None
        self._layer, self._names, self._adapter = layer, selection.names, adapter
        (self._share,) = layer.bound[adapter]
        self._up, self._down = patch.up, patch.down
        self._places = places
        self._base, self._weight, self._bias = base, base._parameters["weight"], base._parameters["bias"]
        self._dtype, self._dropped, self._out = x.dtype, patch.dropout, base.out_features
        dtype = torch.promote_types(base.weight.dtype, patch.up.dtype)
        self._options = patch.scale, Dropout(), products(x, dtype), base.weight.dtype

    @classmethod
    def of(
        cls, layer: AdaptedLayer, selection: Selection, names: Sequence[str], patches: Sequence[Patch], x: Tensor
    ) -> TrainingForward | None:
        """Return the forward pass of a layer under its only patch, where it can be kept."""
        if len(patches) != 1 or not patches[0].only_adds_product or layer.merged or layer.bias_in_place is not None:
            return None
        (patch,), (adapter,) = patches, names
        linear = plain_linear(layer.base_layer, x) if patch.is_node(x, layer.site, True) else None
        if linear is None or torch.is_autocast_enabled(x.device.type) or len(layer.bound[adapter]) != 1:
            return None
        places = [place for tensor in (patch.up, patch.down) for place in _places_of(layer, adapter, tensor)]
        return cls(layer, selection, adapter, places, linear, patch, x) if len(places) == 2 else None

    def takes(self, selection: Selection, x: Tensor) -> bool:
        """Tell whether a call would find the same patch, base layer and kind of input."""
        layer, base = self._layer, self._base
        modules, parameters, shares = layer._modules, base._parameters, layer.bound.get(self._adapter)
        if selection.names != self._names or shares is None or len(shares) != 1 or shares[0] is not self._share:
            return False
        for head, holder, inner, leaf, tensor in self._places:
            held = modules.get(head) is holder and holder._modules.get(self._adapter) is inner
            if not held or inner._parameters.get(leaf) is not tensor:
                return False
        return (
            x.dtype is self._dtype
            and modules["base_layer"] is base
            and parameters["weight"] is self._weight
            and parameters["bias"] is self._bias
            and is_plain(base)
            and self._down.requires_grad
            and is_eager(x)
            and not (self._dropped and is_captured(x))
            and not torch.is_autocast_enabled(x.device.type)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer for ``x``, shape ``(..., in)``."""
        options = self._options
        if self._dropped:
            options = options[0], Dropout.drawn(self._dropped), *options[2:]
        flat = x.reshape(-1, x.shape[-1])
        parts = flat, self._weight, self._bias, None, self._up, self._down, options
        result: Tensor = LowRankUpdate.apply(*parts)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], self._out)


def _places_of(layer: AdaptedLayer, adapter: str, tensor: Tensor | None) -> Iterator[_Place]:
    """Yield where a layer holds a tensor of an adapter, as far as that is below two modules."""
    for head, holder in layer._modules.items():
        inner = None if holder is None else holder._modules.get(adapter)
        if holder is None or inner is None:
            continue
        for leaf, parameter in inner._parameters.items():
            if parameter is not None and parameter is tensor:
                yield head, holder, inner, leaf, parameter
