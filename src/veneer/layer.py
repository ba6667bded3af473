"""The one wrapper module: a base layer, the adapters bound to it, and what the selection makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from veneer.merging.arithmetic import merged
from veneer.methods import AnyMethod
from veneer.patch import Patch, apply, apply_rows
from veneer.selection import Selection, Switch
from veneer.site import Site


class Leaf(nn.Module):
    """Holds the tensors of one adapter under one head: ``lora_A.default`` holds ``weight``."""


class AdaptedLayer(nn.Module):
    """Stands in the place of a base layer that carries adapters.

    Its parameters are named as in peft: ``base_layer.weight``, ``lora_A.<adapter>.weight``. Attributes that it
    does not have (``weight``, ``in_features`` ...) are the base layer's.

    Args:
        site: the base layer.
        switch: what is selected, shared by all layers of the model.
    """

    def __init__(self, site: Site, switch: Switch) -> None:
        super().__init__()
        self.base_layer = site.module
        self.site = site
        self.switch = switch
        # adapter's name -> how to lower its tensors here
        self.bound: dict[str, tuple[AnyMethod, Any]] = {}
        # The adapters whose patches are in the base layer's weight now, and the weight that it had before.
        self.merged: tuple[str, ...] = ()
        self.original: list[nn.Parameter] = []
        self.training = site.module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def bind(self, adapter: str, method: AnyMethod, settings: Any, tensors: Mapping[str, nn.Parameter]) -> None:
        """Add an adapter's tensors (leaf -> parameter), used as they are."""
        for leaf, parameter in tensors.items():
            head, _, tail = leaf.partition(".")
            holder = Leaf()
            holder.train(self.training)
            holder.register_parameter(tail, parameter)
            self._holders(head)[adapter] = holder
        self.bound[adapter] = (method, settings)

    def unbind(self, adapter: str) -> None:
        """Remove an adapter's tensors; the heads that are empty then go too."""
        method, _ = self.bound.pop(adapter)
        for head in {leaf.partition(".")[0] for leaf in method.leaves}:
            holders = self._holders(head)
            del holders[adapter]
            if not holders:
                del self._modules[head]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; its tensors stay the same objects."""
        method, settings = self.bound[old]
        tensors = self.tensors(old)
        self.unbind(old)
        self.bind(new, method, settings, tensors)
        self.merged = tuple(new if name == old else name for name in self.merged)

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """Leaf -> the parameter of an adapter that is bound here."""
        method, _ = self.bound[adapter]
        found: dict[str, nn.Parameter] = {}
        for leaf in method.leaves:
            head, _, tail = leaf.partition(".")
            parameter = getattr(self._holders(head)[adapter], tail)
            assert isinstance(parameter, nn.Parameter)
            found[leaf] = parameter
        return found

    def _holders(self, head: str) -> dict[str, nn.Module | None]:
        """The modules that hold each adapter's tensors under ``head``."""
        holders = self._modules.get(head)
        if holders is None:
            holders = self._modules[head] = nn.ModuleDict()
        # Not ModuleDict's own methods: those forbid names such as "keys" or "forward".
        return holders._modules

    def patch(self, adapter: str) -> Patch:
        """What an adapter that is bound here means for this layer."""
        method, settings = self.bound[adapter]
        return method.lower(settings, self.tensors(adapter))

    def here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``names`` that are bound to this layer, in their order."""
        return tuple(name for name in names if name in self.bound)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output under the selected adapters; arguments and shapes are the base layer's."""
        selection = self.switch.selection
        if selection.rows is not None:
            return self._forward_rows(selection, x, *args, **kwargs)
        names = self.here(selection.names)
        if names == self.merged:
            return self.site.base(None, x, *args, **kwargs)
        y = self._base(x, *args, **kwargs)
        return apply(y, x, [self.patch(name) for name in names], self.training)

    def _forward_rows(self, selection: Selection, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        groups = selection.groups(x.shape[0], x.device)
        patches = {name: self.patch(name) for name in groups if name in self.bound}
        return apply_rows(self._base(x, *args, **kwargs), x, groups, patches, self.training)

    def _base(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with its original weight, merged or not."""
        return self.site.base(self.original[0] if self.original else None, *args, **kwargs)

    def merge(self, names: tuple[str, ...]) -> None:
        """Put the patches of ``names`` into the base layer's weight, from its original bytes."""
        self.unmerge()
        names = self.here(names)
        if names:
            original = self.site.stored
            self.site.store(self.merged_weight(names))
            self.original, self.merged = [original], names

    def merged_weight(self, names: tuple[str, ...]) -> nn.Parameter:
        """The weight (as stored) that the layer has with ``names`` merged; nothing is changed."""
        original = self.original[0] if self.original else self.site.stored
        patches = [self.patch(name) for name in self.here(names)]
        weight = self.site.canonical(merged(self.site.canonical(original.detach()), patches))
        return nn.Parameter(weight, requires_grad=original.requires_grad)

    def unmerge(self) -> None:
        """Put the original weight back: the same tensor, so the same bytes."""
        if self.original:
            self.site.store(self.original[0])
        self.original, self.merged = [], ()

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        # The original weight is kept out of the parameters, so a move or cast must be told of it.
        self.original = [nn.Parameter(fn(w.detach()), requires_grad=w.requires_grad) for w in self.original]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The adapters, in a model's print-out."""
        return f"adapters={list(self.bound)}" + (f", merged={list(self.merged)}" if self.merged else "")
