"""Layers whose adapters are merged while loading, without a module around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from veneer.base_model.sites.site import Site
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters


class MergeOnlyLayer(LayerAdapters):
    """A base layer and its adapters' tensors, until they are merged for good.

    The model does not know of it, so nothing can be run or trained through it.

    Args:
        site: the base layer.
        overwrite: let the merged weight take the memory of the layer's.
    """

    def __init__(self, site: Site, overwrite: bool) -> None:
        self.site = site
        self.overwrite = overwrite
        self.bound: dict[str, list[BoundAdapter]] = {}
        # (adapter's name, a tensor's name in memory) -> the tensor
        self._tensors: dict[tuple[str, str], nn.Parameter] = {}

    def bind(self, adapter: str, share: BoundAdapter, tensors: Mapping[str, nn.Parameter]) -> None:
        self._tensors.update({(adapter, leaf.memory_name): tensors[leaf.name] for leaf in share.leaves})
        self.bound.setdefault(adapter, []).append(share)

    def hold(
        self, adapter: str, tensors: Mapping[str, nn.Parameter], trained: Collection[str] = (), saved: bool = True
    ) -> None:
        """Do nothing: tensors that are no share's own need a place only in a model that is moved or saved."""

    def unbind(self, adapter: str) -> None:
        del self.bound[adapter]
        self._tensors = {key: tensor for key, tensor in self._tensors.items() if key[0] != adapter}

    def tensors(self, adapter: str, share: BoundAdapter) -> dict[str, nn.Parameter]:
        return {leaf.name: self._tensors[adapter, leaf.memory_name] for leaf in share.leaves}

    def store_merged(self, names: tuple[str, ...]) -> None:
        self._store(*self.merged_parameters(names))
