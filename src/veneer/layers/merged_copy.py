"""The merged weight of adapters, kept beside the base's: a layer runs with it while they are selected.

A copy is good while nothing that it was made of has changed. The base's parameters are known by their identity and
version; the adapter's tensors by their version, and by a digest of their values after one may have been written without
a version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model import sharding
from veneer.base_model.sites import offload
from veneer.base_model.sites.site import copy_with
from veneer.layers.bias_in_place import HeldBias
from veneer.patches.active_selection import ActiveSelection
from veneer.patches.fused import CachedForward
from veneer.patches.selection import Selection
from veneer.patches.watched_parameters import Edits, Watched, WatchedBase, detached, unwatch_base, watch_base
from veneer.patches.weight_arithmetic import merged_bias


def obstacle(layer: HoldsCopies, names: tuple[str, ...]) -> str | None:
    """Return the reason why no merged weight of a layer can be kept; ``None`` where one can."""
    site, base = layer.site, layer.parameters_below(names)
    reasons = {
        "its weight is quantised": site.is_packed,
        "its weight is spread over processes": any(map(sharding.is_sharded, base)),
        "its weight is offloaded": any(p.is_meta for p in base) or offload.offloading_hook(site.module) is not None,
        "its weight is no plain parameter of torch's": not all(map(_can_be_watched, base)),
        "several adapters change its weight and its bias by themselves": layer.is_nested and not site.inside_layer,
        "the adapter is trained, or was loaded in torch.inference_mode()": not _are_watched(layer.sources_above(names)),
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

    def __init__(self, layer: HoldsCopies, names: tuple[str, ...]) -> None:
        self.base = layer.parameters_below(names)
        watch_base(self.base)
        self._base_version = _version(self.base)
        self.edits, self.sources = Edits.last, layer.sources_above(names)
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

    def is_current(self, layer: HoldsCopies, names: tuple[str, ...]) -> bool:
        """Tell whether a merge would give the same now."""
        base, edits = layer.parameters_below(names), Edits.last
        if len(base) != len(self.base) or not all(map(_is_watched_still, base, self.base)):
            return False
        if _version(base) != self._base_version:
            return False
        if edits is self.edits and _version(self.sources) == self._sources_version:
            return True
        sources = layer.sources_above(names)
        version = _version(sources)
        if not _are_watched(sources) or digest(sources) != self._digest:
            return False
        self.edits, self.sources, self._sources_version = edits, sources, version
        return True


@torch.no_grad()
def copy_nbytes(layer: HoldsCopies, names: tuple[str, ...]) -> int:
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
        values = detached(tensor).cpu().contiguous()
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

    def __init__(self, selection: Selection, layer: HoldsCopies, copy: MergedCopy) -> None:
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


def _forward_with(layer: HoldsCopies, copy: MergedCopy) -> Callable[[Tensor], Any]:
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


class HoldsCopies(HeldBias):
    """A layer that may hold merged copies beside its base's weight, and drops them in time.

    Attributes:
        merged_copies: adapters -> the merged copy that is kept for them; replaced whole.
    """

    base_layer: Any
    active_selection: ActiveSelection
    merged_copies: Mapping[tuple[str, ...], MergedCopy] = MappingProxyType({})

    def call_with(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output with other parameters."""
        return self.site.base_with(weight, bias, *args, **kwargs)

    def sources(self, names: tuple[str, ...]) -> list[Tensor]:
        """Return the tensors of adapters, and those that they share with other layers."""
        return [t for n in names for s in self.bound[n] for t in (*self.tensors(n, s).values(), *s.shared.values())]

    @property
    def is_nested(self) -> bool:
        """True where it wraps another adapted layer of the same module."""
        return self.base_layer is not self.site.module

    def parameters_below(self, names: tuple[str, ...]) -> list[Tensor]:
        """Return the module's own parameters of which a copy for ``names`` is made, wherever they lie.

        These are its weight and bias, whatever is merged into it now, and the bias that one of ``names`` trains there.
        """
        held = [*(self.original or (None if self.site.shift_only else self.site.stored, self.site.bias))]
        own, in_place = self.own_bias, self.bias_in_place
        if in_place is not None:
            held = [in_place.original if parameter is own else parameter for parameter in held]
            held += [own] if in_place.adapter in names else []
        return [parameter for parameter in held if parameter is not None]

    def sources_above(self, names: tuple[str, ...]) -> list[Tensor]:
        """Return the adapters' tensors of which a copy is made, but for a bias that lies in the module."""
        return [tensor for tensor in self.sources(names) if tensor is not self.own_bias]

    def merged_copy(self, names: tuple[str, ...]) -> MergedCopy | None:
        """Return the merged copy of ``names``, which are here; one that is out of date is dropped."""
        copy = self.merged_copies.get(names)
        if copy is None or copy.is_current(self, names):
            return copy
        self.drop_copies(lambda others: others == names)
        return None

    def drop_copies(self, drops: Callable[[tuple[str, ...]], bool] = lambda names: True) -> None:
        """Drop the merged copies of those adapters for which ``drops`` says so."""
        if not self.merged_copies:
            return
        with self.active_selection.choosing:
            before = self.merged_copies
            self.merged_copies = {names: copy for names, copy in before.items() if not drops(names)}
            if not self.merged_copies:
                unwatch_base(*(parameter for copy in before.values() for parameter in copy.base))
        self.forget_cached()

    def keep_copy(self, names: tuple[str, ...], copy: MergedCopy) -> None:
        """Keep a merged copy of ``names``, which are here."""
        with self.active_selection.choosing:
            self.merged_copies = {**self.merged_copies, names: copy}
        self.forget_cached()

    def drop_outdated_copies(self) -> None:
        """Drop the merged copies whose weights have changed, so that their memory is free at once."""
        for names in self.merged_copies:
            self.merged_copy(names)

    def place_bias(self, adapter: str) -> None:
        self.drop_copies()
        super().place_bias(adapter)

    def take_out_bias(self) -> None:
        if self.bias_in_place is not None:
            self.drop_copies()
        super().take_out_bias()

    def shares_changed(self, adapter: str) -> None:
        """Drop what is kept of an adapter, whose share of this layer is another now."""
        if any(adapter in names for names in self.merged_copies):
            self.drop_copies(lambda names: adapter in names)
        self.forget_adapter(adapter)

    def rename(self, old: str, new: str) -> None:
        copies = self.merged_copies
        self.merged_copies = {}
        super().rename(old, new)
        self.merged_copies = {tuple(new if n == old else n for n in names): copy for names, copy in copies.items()}
