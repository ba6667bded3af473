"""Prepares and completes a merge into layers with packed (quantised) weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from veneer.base_model.sites import packed_site
from veneer.base_model.transformers_internals import forget_quantization
from veneer.errors import MergeError
from veneer.layers.adapter_shares import LayerAdapters
from veneer.layers.quantized_layer import PackedLayer
from veneer.layers.quantized_merge import CHOICES, REQUANTIZED, Into, QuantizedMerge, into_missing
from veneer.printing import warn


def choose(
    layers: Iterable[LayerAdapters], names: tuple[str, ...], into: str | None, dtype: torch.dtype
) -> list[PackedLayer]:
    """Choose what becomes of the packed layers that a merge of ``names`` changes, and return them.

    Args:
        layers: every adapted layer of the model.
        names: the adapters to be merged.
        into: the user's choice; required where a packed layer changes.
        dtype: of a dequantised layer.
    """
    if into not in (None, *CHOICES):
        raise MergeError(f"Unknown into={into!r}.", hint=f"Known: {' and '.join(map(repr, CHOICES))}.")
    packed = [layer for layer in layers if isinstance(layer, PackedLayer) and layer.here(names)]
    if into is None and packed:
        raise into_missing(packed[0].site.name)
    if into == REQUANTIZED and names and not packed:
        raise MergeError(
            f"into={into!r} packs the merged weights again, and no layer adapted by {list(names)} is quantised.",
            hint="Leave into out.",
        )
    for layer in packed:
        layer.into = Into(str(into), dtype)
    return packed


def measured(packed: Sequence[PackedLayer]) -> QuantizedMerge | None:
    """Return the error that packing added to the last merge, and warn when it is large."""
    chosen = next((layer.into.choice for layer in packed if layer.into is not None), None)
    if chosen is None:
        return None
    merge = QuantizedMerge(chosen, {layer.site.id: layer.error for layer in packed if layer.error is not None})
    if merge.lost:
        warn(merge.warning())
    return merge


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every packed layer of a model a plain one, and its config that of a plain model."""
    for name, module in list(model.named_modules()):
        site = packed_site(name, module)
        if site is not None:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = site.plain(site.weight(), site.bias, dtype)
    forget_quantization(model)
