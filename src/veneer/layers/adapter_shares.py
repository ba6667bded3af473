"""The adapters bound to one base layer, lowered to patches of its weight and bias."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.site import Site
from veneer.methods import AnyMethod
from veneer.methods.base.method import BaseLayer, Leaf
from veneer.methods.base.trained_bias import Bias
from veneer.patches.patch import Patch
from veneer.patches.weight_arithmetic import merged, merged_bias


@dataclass(frozen=True)
class BoundAdapter:
    """One adapter's share of a layer.

    Attributes:
        method: lowers its tensors.
        settings: its config, worked out for this layer.
        leaves: its tensors.
        key: the name that their keys in a checkpoint begin with; ``None`` for a layer that shares another's tensors.
        shared: leaf -> tensor beside its own: one that all layers use and one of them holds, or a frozen one.
    """

    method: AnyMethod
    settings: Any
    leaves: tuple[Leaf, ...]
    key: str | None
    shared: Mapping[str, nn.Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainBase:
    """A base layer without adapters, as a method sees it."""

    site: Site

    @property
    def base_bias(self) -> nn.Parameter | None:
        """The bias, shape ``(out,)``."""
        bias: nn.Parameter | None = self.site.resident(self.site.bias, "bias")
        return bias

    def base_weight(self) -> Tensor:
        """Return the weight as a canonical matrix."""
        return self.site.weight()


@dataclass(frozen=True)
class BaseWithBias:
    """A base layer with a trained bias in the place of its own, as a method sees it."""

    layer: BaseLayer
    base_bias: Tensor

    @property
    def site(self) -> Site:
        """The layer's kind, name and shape."""
        return self.layer.site

    def base_weight(self) -> Tensor:
        """Return the weight as a canonical matrix."""
        return self.layer.base_weight()


@dataclass
class BiasInPlace:
    """The bias that an adapter trains, while it is the base layer's own parameter.

    Attributes:
        adapter: the adapter.
        original: the values that the parameter has without it.
    """

    adapter: str
    original: nn.Parameter


class LayerAdapters:
    """A base layer and the adapters bound to it, as patches of its weight and bias.

    Attributes:
        site: the base layer.
        bound: adapter's name -> its shares of this layer, in the order in which they apply.
        merged: the adapters whose patches are in the base layer's weight now.
        original: the parameters that the base layer had before a merge that can be undone; empty when none is made.
        bias_in_place: the trained bias that is the base layer's parameter, or was before the merge.
        overwrite: True where a merge may take the memory of the weight.
    """

    site: Site
    bound: dict[str, list[BoundAdapter]]
    merged: tuple[str, ...] = ()
    original: Sequence[nn.Parameter | None] = ()
    bias_in_place: BiasInPlace | None = None
    overwrite = False

    def bind(self, adapter: str, share: BoundAdapter, tensors: Mapping[str, nn.Parameter]) -> None:
        """Add an adapter's tensors (leaf -> parameter), used as they are."""
        raise NotImplementedError

    def hold(
        self, adapter: str, tensors: Mapping[str, nn.Parameter], trained: Collection[str] = (), saved: bool = True
    ) -> None:
        """Keep tensors that are no share's own among the layer's, so that they move with the model.

        Args:
            adapter: the adapter that they belong to.
            tensors: the tensors by name.
            trained: the names of those that training may change; all others are buffers.
            saved: put these into the model's state dict; those that base and config tell need not be there.
        """
        raise NotImplementedError

    def unbind(self, adapter: str) -> None:
        """Remove an adapter's tensors."""
        raise NotImplementedError

    def tensors(self, adapter: str, share: BoundAdapter) -> dict[str, nn.Parameter]:
        """Return the parameter of each leaf of an adapter's share of this layer."""
        raise NotImplementedError

    def store_merged(self, names: tuple[str, ...]) -> None:
        """Merge for good, giving up the original parameters."""
        raise NotImplementedError

    def reset(self, adapter: str, share: BoundAdapter, settings: Any) -> None:
        """Give an adapter's share of this layer other settings; its tensors may have been changed."""
        shares = self.bound[adapter]
        shares[shares.index(share)] = replace(share, settings=settings)

    def patches(self, names: Sequence[str]) -> list[Patch]:
        """Return the patches of adapters that are bound here, in the order in which they apply."""
        return [patch for name in names for patch in self._lowered(name)]

    def _lowered(self, name: str, without: type[AnyMethod] | None = None) -> Iterator[Patch]:
        """Yield the patches of an adapter; its own change starts from the bias that it trains."""
        base: BaseLayer = self
        *_, last = shares = self.bound[name]
        for share in shares:
            tensors = {**self.tensors(name, share), **share.shared}
            if without is None or not isinstance(share.method, without):
                yield share.method.lower(share.settings, tensors, base)
            if share is not last and isinstance(share.method, Bias):
                base = BaseWithBias(base, tensors[share.method.name])

    def weight_patches(self, names: Sequence[str]) -> list[Patch]:
        """Return the patches as changes of the layer's weight; ``MergeError`` where no weight can hold one."""
        return [self.site.in_weight(patch) for patch in self.patches(names)]

    def here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of ``names`` that are bound to this layer, in their order."""
        return tuple(name for name in names if name in self.bound)

    def lacks_bias(self, names: tuple[str, ...]) -> bool:
        """Tell whether ``names`` move the output of a layer that has no bias to hold this once they are merged."""
        if self.site.shift_only or self.base_bias is not None:
            return False
        shares = [(name, share) for name in self.here(names) for share in self.bound[name]]
        return any(
            bool(tensor.count_nonzero())
            for name, share in shares
            for leaf, tensor in self.tensors(name, share).items()
            if share.method.leaf(leaf).moves_bias
        )

    @property
    def base_stored(self) -> nn.Parameter:
        """The base layer's weight as stored, whatever is merged into it now."""
        if self.bias_in_place is not None and self.site.is_bias:
            return self._original_bias(self.bias_in_place)
        weight = self.original[0] if self.original else None
        stored: nn.Parameter = self.site.resident(
            self.site.stored if weight is None else weight, self.site.parameter, below=bool(self.original)
        )
        return stored

    def _original_bias(self, in_place: BiasInPlace) -> nn.Parameter:
        """Return the bias without a trained one, on the layer's device: FSDP moves the layer's parameters alone."""
        own = self.site.stored if self.site.is_bias else self.site.bias
        bias: Any = in_place.original if own is None else in_place.original.to(own.device)
        original: nn.Parameter = bias
        return original

    @property
    def base_bias(self) -> nn.Parameter | None:
        """The base layer's bias, whatever is merged into it now."""
        if self.bias_in_place is not None and not self.site.is_bias:
            return self._original_bias(self.bias_in_place)
        bias = self.original[1] if self.original else self.site.bias
        resident: nn.Parameter | None = self.site.resident(bias, "bias", below=bool(self.original))
        return resident

    def base_weight(self) -> Tensor:
        """Return the base layer's weight as a canonical matrix, whatever is merged into it now."""
        unchanged = not self.original and (self.bias_in_place is None or not self.site.is_bias)
        return self.site.weight() if unchanged else self.site.canonical(self.base_stored.detach())

    def merged_parameters(self, names: tuple[str, ...]) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Return the weight (as stored) and bias that the layer has with ``names`` merged.

        Nothing is changed yet, unless :attr:`overwrite` says that the weight's memory may be taken.
        """
        patches = self.weight_patches(self.here(names))
        bias = self.base_bias
        if self.site.shift_only:
            return None, parameter_like(merged_bias(bias, patches, torch.float32), bias)
        stored = self.base_stored
        if not patches:
            return stored, bias
        weight = self.site.as_stored(merged(self.base_weight(), patches, overwrite=self.overwrite))
        return parameter_like(weight, stored), parameter_like(merged_bias(bias, patches, stored.dtype), bias)

    def change_base(self, patch: Patch) -> None:
        """Put a patch of no adapter into the base layer's weight for good."""
        weight = self.site.as_stored(merged(self.base_weight(), [patch]))
        self._store(parameter_like(weight, self.base_stored), self.base_bias)

    def _store(self, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        if weight is None:
            self.site.store_bias(bias)
        else:
            self.site.store(weight, bias)


def parameter_like(tensor: Tensor | None, model: nn.Parameter | None) -> Any:
    """Return ``tensor`` as a parameter that wants gradients as ``model`` does."""
    # Detached, for the bias of a base that stays the same may be of a class that cannot be made from.
    wants_grad = model is not None and model.requires_grad
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=wants_grad)
