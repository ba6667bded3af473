"""The wrapper of a packed layer, which a merge replaces by another one and leaves as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.base_model.sites.quantized.packed import PackedSite
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.quantized_merge import DEQUANTIZED, Into, LayerError, into_missing, layer_error
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.selection import Selection
from veneer.patches.weight_arithmetic import merged, merged_bias


class PackedLayer(AdaptedLayer):
    """An :class:`AdaptedLayer` whose ``site.module`` is the packed layer throughout, to be put back by unmerging.

    Attributes:
        into: the form that merged weights get; to be set before a merge.
        error: the loss of the last merge.
    """

    site: PackedSite

    def __init__(self, site: PackedSite, active_selection: ActiveSelection) -> None:
        super().__init__(site, active_selection)
        self.into: Into | None = None
        self.error: LayerError | None = None

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        if self.bias_in_place is not None:
            return self.site.base_with_bias(self.base_bias, *args, **kwargs)
        return self.site.module(*args, **kwargs)

    def _readable(self, selection: Selection, names: tuple[str, ...]) -> None:
        """Return ``None``, for a packed weight holds no adapter without a merge."""

    def merge_adapters(self, names: tuple[str, ...]) -> None:
        self.unmerge()
        names = self.here(names)
        if names:
            self.base_layer, self.merged = self._merged_layer(names), names
        self.forget_cached()

    def store_merged(self, names: tuple[str, ...]) -> None:
        layer = self._merged_layer(self.here(names))
        self.unmerge()
        self.take_out_bias()
        self.base_layer = layer
        self.forget_cached()

    def unmerge(self) -> None:
        self.base_layer, self.merged = self.site.module, ()
        self.forget_cached()

    def merged_parameters(self, names: tuple[str, ...]) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Return the weight (float32) and bias with ``names`` merged, before the weight is stored in any form."""
        patches = self.patches(self.here(names))
        bias = merged_bias(self.base_bias, patches, self._into.dtype)
        weight = merged(self.base_weight(), patches)
        return nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)

    @torch.no_grad()
    def _merged_layer(self, names: tuple[str, ...]) -> nn.Module:
        exact, bias = self.merged_parameters(names)
        assert exact is not None
        if self._into.choice == DEQUANTIZED:
            layer: nn.Module = self.site.plain(exact, bias, self._into.dtype)
            held = exact.to(self._into.dtype).float()
        else:
            layer = self.site.packed(exact, bias)
            held = type(self.site)(self.site.name, layer).weight()
        self.error = layer_error(held, exact, self.base_weight())
        return layer

    @property
    def _into(self) -> Into:
        if self.into is None:
            raise into_missing(self.site.name)
        return self.into

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        if self.merged:
            self.site.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> PackedLayer:
        """Set the mode of this layer and of all in it, including the layer that a merge has replaced."""
        self.site.module.train(mode)
        super().train(mode)
        return self
