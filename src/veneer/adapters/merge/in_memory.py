"""Merges adapters into the weights of a model in memory, to be undone or for good."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapters.merge.into_quantized import choose, dequantize, measured
from veneer.adapters.merge.new_bias import new_biases
from veneer.adapters.merge.untie import untie
from veneer.adapters.merge.worker_threads import for_each
from veneer.base_model.catalog import Catalog
from veneer.base_model.transformers_internals import forget_packing_rules
from veneer.errors import MergeError
from veneer.layers.adapter_shares import LayerAdapters
from veneer.layers.quantized_layer import PackedLayer
from veneer.layers.quantized_merge import DEQUANTIZED
from veneer.layers.sharded_layer import ShardedLayer
from veneer.patches.weight_arithmetic import check_kept
from veneer.printing import warn

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


LayerT = TypeVar("LayerT", bound=LayerAdapters)


def merge(adapters: Adapters, names: Sequence[str] | None, *, check: bool = False, into: str | None = None) -> None:
    """Put adapters into the base weights, to be undone by ``adapters.unmerge()``, and select them.

    The original weights are kept, so this costs memory for a second copy of each adapted layer. Adapters
    that are merged already stay merged. Any other selection is still right afterwards, only slower.
    """
    with adapters.changing():
        _merge(adapters, names, check, into)


def _merge(adapters: Adapters, names: Sequence[str] | None, check: bool, into: str | None) -> None:
    to_merge = _chosen(adapters, names)
    merged = [name for name in adapters.by_name if any(name in layer.merged for layer in adapters.layers.values())]
    selection = adapters.selection(list(dict.fromkeys([*merged, *to_merge])))
    if to_merge and set(to_merge) <= set(merged):
        warn(f"All adapters are already merged, nothing to do: {', '.join(to_merge)}.")
    check_mergeable(adapters, selection.names)
    packed = choose(adapters.layers.values(), selection.names, into, adapters.catalog.dtype)
    if check:
        _check_merge(adapters, selection.names)
    _change(adapters.adapted_layers, lambda layer: layer.merge_adapters(selection.names))
    adapters.select(selection.names)
    adapters.quantized_merge = measured(packed) or adapters.quantized_merge


def merge_and_unload(
    adapters: Adapters, names: Sequence[str] | None, *, check: bool = False, into: str | None = None
) -> nn.Module:
    """Put adapters into the base weights for good and take the adapter layers off."""
    with adapters.changing():
        return _merge_and_unload(adapters, names, check, into)


def _merge_and_unload(adapters: Adapters, names: Sequence[str] | None, check: bool, into: str | None) -> nn.Module:
    merged = adapters.selection(_chosen(adapters, names)).names
    check_mergeable(adapters, merged)
    packed = choose(adapters.layers.values(), merged, into, adapters.catalog.dtype)
    biases = new_biases(adapters.layers.values(), merged, adapters.catalog.model)
    if check:
        _check_merge(adapters, merged)
        _check_saved(adapters, merged)
    layers = [layer for layer in adapters.layers.values() if layer.here(merged)]
    _change(layers, lambda layer: layer.store_merged(merged))
    groups, alike = adapters.catalog.shared if merged else [], _changed_alike(adapters, merged)
    for root, copies in adapters.module_copies.items():
        for name in copies.here(merged)[:1]:
            adapters.catalog.modules[root] = copies.original_module = copies.as_base_module(name)
    model = adapters.unload(keep=True)
    biases.put_into(model)
    untie(model, groups, alike)
    if packed:
        adapters.quantized_merge = measured(packed)
        if into == DEQUANTIZED:
            dequantize(model, adapters.catalog.dtype)
        forget_packing_rules(model)
    adapters.catalog = Catalog(model)
    return model


def _chosen(adapters: Adapters, names: Sequence[str] | None) -> list[str]:
    """Return the adapters to merge: the selected ones, unless they are named."""
    selection = adapters.active_selection.default
    if names is None and selection.by_layer:
        raise MergeError(
            f"{len(selection.by_layer)} layers have other adapters active than the model, and one selection is merged.",
            hint="Name the adapters to merge, or select them on the model first: set_adapter(...), enable_adapters().",
        )
    return list(selection.names if names is None else names)


def check_mergeable(adapters: Adapters, names: Sequence[str]) -> None:
    """Raise ``MergeError``, before anything is merged, when one of ``names`` cannot be."""
    for name in names:
        adapters.by_name[name].check_mergeable()


def _change(layers: Collection[LayerT], action: Callable[[LayerT], None]) -> None:
    """Change the weights of layers: several at a time where they lie in memory and are torch's own."""
    # Layers of one module change its bias in turn.
    groups: dict[int, list[LayerT]] = {}
    for layer in layers:
        groups.setdefault(id(layer.site.module), []).append(layer)

    def run(group: list[LayerT]) -> None:
        for layer in group:
            action(layer)

    if all(map(is_in_memory, layers)):
        for_each(run, groups.values())
    else:
        for group in groups.values():
            run(group)


def _check_merge(adapters: Adapters, names: tuple[str, ...]) -> None:
    for name, layer in adapters.layers.items():
        wrong = [leaf for leaf, tensor in _leaves(layer, names) if not _is_finite(tensor)]
        if wrong:
            raise MergeError(
                f"NaNs detected in the merged {wrong[0]}. The adapter {', '.join(names)} seems to be broken. "
                f"Merging gives NaN or infinite values in {name}; nothing was merged.",
                hint="The weight's dtype may be too small for the change: load the base in bfloat16 or float32.",
            )


def _leaves(layer: LayerAdapters, names: tuple[str, ...]) -> Iterable[tuple[str, Tensor | None]]:
    return zip(("weights", "bias"), _storable(layer, names), strict=True) if layer.here(names) else ()


def _storable(layer: LayerAdapters, names: tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return a layer's merged weight and bias in the dtype that they will be stored in."""
    weight, bias = layer.merged_parameters(names)
    if isinstance(layer, PackedLayer) and layer.into is not None and layer.into.choice == DEQUANTIZED:
        return None if weight is None else weight.to(layer.into.dtype), bias
    return weight, bias


def _check_saved(adapters: Adapters, names: tuple[str, ...]) -> None:
    """Raise ``MergeError`` where a module that comes whole does not fit into the dtypes of the base's."""
    for root, copies in adapters.module_copies.items():
        for name in copies.here(names)[:1]:
            base = copies.original_module.state_dict()
            for leaf, tensor in copies.copies[name].state_dict().items():
                if tensor.is_floating_point():
                    check_kept(tensor, tensor.to(base[leaf].dtype), f"{root}.{leaf}")


def _changed_alike(adapters: Adapters, names: Sequence[str]) -> set[str]:
    """Return the embeddings that share a weight and that adapters change by the same tensors."""

    def tensors(module: str) -> set[int]:
        layers = [layer for layer in adapters.layers.values() if layer.site.name == module]
        return {
            id(tensor)
            for layer in layers
            for name in layer.here(tuple(names))
            for share in layer.bound[name]
            for tensor in layer.tensors(name, share).values()
        }

    if not all(getattr(adapters.by_name[name].config, "ensure_weight_tying", False) for name in names):
        return set()
    pairs = [(a, b) for a, b in adapters.catalog.tied_embeddings if tensors(a) and tensors(a) == tensors(b)]
    return {name for pair in pairs for name in pair}


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


def is_in_memory(layer: LayerAdapters) -> bool:
    """Tell whether several threads can merge such layers: their parameters are torch's own, in the CPU's memory."""
    plain = not isinstance(layer, (PackedLayer, ShardedLayer))
    return plain and all(p.device.type == "cpu" for p in layer.site.module.parameters())
