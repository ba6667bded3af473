"""The merged weight of adapters, kept beside the base's: a layer runs with it while they are selected.

A copy is good while nothing that it was made of has changed. The base's parameters are known by their identity and
version; the adapter's tensors by their version, and by a digest of their values after one may have been written without
a version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model import sharding
from veneer.base_model.sites import offload
from veneer.base_model.sites.site import copy_with
from veneer.patches.fused import CachedForward
from veneer.patches.selection import Selection
from veneer.patches.watched_parameters import Edits, Watched, WatchedBase, watch_base
from veneer.patches.weight_arithmetic import merged_bias

if TYPE_CHECKING:
    from veneer.layers.adapted_layer import AdaptedLayer


def obstacle(layer: AdaptedLayer, names: tuple[str, ...]) -> str | None:
    """Return the reason why no merged weight of a layer can be kept; ``None`` where one can."""
    site, base = layer.site, layer.base_parameters
    reasons = {
        "its weight is quantised": site.is_packed,
        "its weight is spread over processes": any(map(sharding.is_sharded, base)),
        "its weight is offloaded": any(p.is_meta for p in base) or offload.offloading_hook(site.module) is not None,
        "its weight is no plain parameter of torch's": not all(map(_can_be_watched, base)),
        "several adapters change its weight and its bias by themselves": layer.is_nested and not site.inside_layer,
        "the adapter is trained, or was loaded in torch.inference_mode()": not _are_watched(layer.sources(names)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _can_be_watched(parameter: Tensor) -> bool:
    return type(parameter) in (nn.Parameter, WatchedBase) and not parameter.is_inference()


def _are_watched(tensors: Iterable[Tensor]) -> bool:
    return all(type(tensor) is Watched for tensor in tensors)


class MergedCopy:
    """Holds a layer's weight and bias with adapters merged, bit for bit as a merge stores them.

    Args:
        layer: the layer; :func:`obstacle` finds nothing against it.
        names: adapters that are on it.

    Attributes:
        base: the base's parameters that it was made of.
        sources: the adapters' tensors that it was made of.
        edits: the last edit of any adapter that it is known to have outlived.
        weight: as stored; ``None`` where the adapters move the bias alone.
        bias: the bias, in the base's memory where it stays the same.
    """

    __slots__ = ("_base_version", "_digest", "_sources_version", "base", "bias", "edits", "sources", "weight")

    def __init__(self, layer: AdaptedLayer, names: tuple[str, ...]) -> None:
        self.base = layer.base_parameters
        watch_base(self.base)
        self._base_version = _version(self.base)
        self.edits, self.sources = Edits.last, layer.sources(names)
        self._sources_version = _version(self.sources)
        self._digest = digest(self.sources)
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = layer.merged_parameters(names)
            self.weight: Tensor | None = None if weight is None else weight.detach()
            self.bias: Tensor | None = _bias(None if bias is None else bias.detach(), layer.base_bias)

    @property
    def version(self) -> int:
        """The sum of the versions that the tensors had which it was made of."""
        return self._base_version + self._sources_version

    @property
    def own_tensors(self) -> list[Tensor]:
        """The tensors that take memory beside the base's."""
        tensors = (self.weight, self.bias)
        return [tensor for tensor in tensors if tensor is not None and not _is_in_memory_of(tensor, self.base)]

    def is_current(self, layer: AdaptedLayer, names: tuple[str, ...]) -> bool:
        """Tell whether a merge would give the same now."""
        base, edits = layer.base_parameters, Edits.last
        if len(base) != len(self.base) or not all(map(_is_watched_still, base, self.base)):
            return False
        if _version(base) != self._base_version:
            return False
        if edits is self.edits and _version(self.sources) == self._sources_version:
            return True
        sources = layer.sources(names)
        version = _version(sources)
        if not _are_watched(sources) or digest(sources) != self._digest:
            return False
        self.edits, self.sources, self._sources_version = edits, sources, version
        return True


@torch.no_grad()
def copy_nbytes(layer: AdaptedLayer, names: tuple[str, ...]) -> int:
    """Return the bytes that a merged copy takes beside the base's, before it is made."""
    weight = None if layer.site.shift_only else layer.base_stored
    base, dtype = layer.base_bias, torch.float32 if weight is None else weight.dtype
    moves = any(leaf.moves_bias for name in names for share in layer.bound[name] for leaf in share.leaves)
    has_bias = base is not None or moves
    bias = _bias(merged_bias(base, layer.weight_patches(names), dtype), base) if has_bias else None
    of_bias = 0 if bias is None or _is_in_memory_of(bias, [base]) else bias.nbytes
    return of_bias + (0 if weight is None else weight.nbytes)


def _bias(merged: Tensor | None, base: Tensor | None) -> Tensor | None:
    """Return a merged bias; in the base's memory where it stays the same."""
    stays = merged is not None and base is not None and torch.equal(merged, base)
    return Tensor.detach(base) if stays else merged  # type: ignore[arg-type]


def _is_in_memory_of(tensor: Tensor, others: Iterable[Tensor | None]) -> bool:
    return any(other is not None and tensor.data_ptr() == other.data_ptr() for other in others)


def _version(tensors: Iterable[Tensor]) -> int:
    """Return a number that grows whenever one of the tensors is changed in place."""
    return sum([tensor._version for tensor in tensors])


def _is_watched_still(now: Tensor, then: Tensor) -> bool:
    return now is then and type(now) is WatchedBase


def digest(tensors: Iterable[Tensor]) -> bytes:
    """Return a digest of the values of tensors."""
    hasher = blake3()
    for tensor in tensors:
        values = Tensor.detach(tensor).cpu().contiguous()  # not a watched tensor's own method, which notes an edit
        hasher.update(f"{values.dtype} {tuple(values.shape)}".encode())
        hasher.update(memoryview(values.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return hasher.digest()


class CopyForward(CachedForward):
    """Caches the forward pass of a layer with a merged copy.

    Args:
        selection: the selection.
        layer: the layer, which calls the base's module itself.
        copy: the copy, current for the adapters of the selection.
    """

    __slots__ = ("_base", "_places")

    def __init__(self, selection: Selection, layer: AdaptedLayer, copy: MergedCopy) -> None:
        super().__init__(selection, [*copy.sources, *copy.base])
        self._call = None  # the base's parameters are watched, too
        self._edits, self._version = copy.edits, copy.version
        self._base = copy.base
        held: dict[str, Any] = layer.site.module._parameters
        # While adapters are merged, others than the base's parameters lie in the module.
        self._places: list[tuple[dict[str, Any], str, Any]] = [(layer._modules, "base_layer", layer.site.module)]
        self._places += [(held, name, held[name]) for name in (layer.site.parameter, "bias") if name in held]
        self.forward = _forward_with(layer, copy)

    def is_current(self, selection: Selection) -> bool:
        """Tell whether the copy is good, and the module as it was."""
        if self._edits is not Edits.last or self._sum() != self._version:
            return False
        for parameter in self._base:
            if type(parameter) is not WatchedBase:
                return False
        # Loops, for a generator costs a decode step half a microsecond in each layer.
        for holder, name, there in self._places:  # noqa: SIM110
            if holder.get(name) is not there:
                return False
        return True

    def wants_grad(self, x: Tensor) -> bool:
        """Tell whether a gradient would flow to what the copy was made of; one to ``x`` does no harm."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.sources)


def _forward_with(layer: AdaptedLayer, copy: MergedCopy) -> Callable[[Tensor], Any]:
    """Return the base layer's own operation with the tensors of a copy."""
    module, weight, bias = layer.site.module, copy.weight, copy.bias
    attributes = module.__dict__
    tensors = {"bias": bias} if weight is None else {layer.site.parameter: weight, "bias": bias}
    changed = {name: tensor for name, tensor in tensors.items() if name in module._parameters or tensor is not None}
    twin = copy_with(module, changed)

    def call(x: Tensor) -> Any:
        if "forward" in attributes:
            return layer.call_with(layer.site.stored if weight is None else weight, bias, x)
        # In one step, for other threads call the twin, too.
        twin.__dict__.update({**attributes, "_parameters": {**attributes["_parameters"], **changed}})
        return twin(x)

    def linear(x: Tensor) -> Any:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in attributes:
            return call(x)
        return F.linear(x, weight, bias)  # type: ignore[arg-type]

    return linear if type(module) is nn.Linear and weight is not None else call
