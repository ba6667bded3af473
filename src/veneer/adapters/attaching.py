"""The steps by which any adapter comes onto a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.base_model.tied_embeddings import pairs_kept_tied
from veneer.checkpoints.binding_plan import Plan
from veneer.files.tensor_keys import encode


class Attaching(ABC):
    """Brings one adapter onto a model, step by step.

    Args:
        adapters: of the model.
        adapter: without tensors yet.
        float32: give its floating-point tensors that dtype, where they are narrower.
    """

    def __init__(self, adapters: Adapters, adapter: Adapter, float32: bool) -> None:
        self.adapters, self.adapter, self.float32 = adapters, adapter, float32

    @abstractmethod
    def complete_config(self) -> None:
        """Check the config against the model, and fill in what it leaves to that."""

    @abstractmethod
    def check_tied(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        """Raise where two layers that are to stay alike would part in training."""

    @abstractmethod
    def restore(self, plan: Plan, tensors: dict[str, Tensor]) -> None:
        """Bind a checkpoint's tensors, but for those of whole modules."""

    @abstractmethod
    def create(self, roots: list[str], generator: torch.Generator | None) -> None:
        """Bind new tensors, but for those of the whole modules ``roots``."""

    def restore_whole_modules(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        """Place copies of the modules that the checkpoint holds whole."""
        catalog, adapter = self.adapters.catalog, self.adapter
        named = catalog.whole_modules(adapter.config) if plan.whole_modules else []
        values = {root: {leaf: tensors[key] for leaf, key in keys.items()} for root, keys in plan.whole_modules.items()}
        for root in plan.whole_modules.keys() - named:
            # These are the base's own rows, so all layers that share them get them.
            sharing = [site.name for site in catalog.sharing(root) if site.id not in adapter.layers.by_id]
            values.update({name: {"weight": values[root]["weight"]} for name in sharing if name not in values})
        adapter.whole_modules.untrained = values.keys() - named
        for root, leaves in values.items():
            trainable = adapter.trainable and root in named
            self.place_copy(root, leaves, trainable)
            if not trainable:
                adapter.saved_dtypes.update(
                    {encode(root, leaf, adapter.prefix): tensor.dtype for leaf, tensor in leaves.items()}
                )

    def place_copy(self, root: str, values: Mapping[str, Tensor] | None, trainable: bool) -> None:
        """Place the adapter's copy of a module, with the base's values where it has none of its own."""
        copies = self.adapters.place_copies(root)
        copies.add(self.adapter.name, values).requires_grad_(trainable)
        self.adapter.whole_modules.copies[root] = copies

    def registered(self) -> Adapter:
        """Add the adapter, whose tensors are all bound, to those of the model."""
        _join_saved(self.adapters, self.adapter)
        self.adapters.register(self.adapter)
        return self.adapter


def _join_saved(adapters: Adapters, adapter: Adapter) -> None:
    """Let two copies of layers that share a weight, and are to stay alike, share theirs where it is the same."""
    for pair in pairs_kept_tied(adapter.config, adapters.catalog):
        if set(pair) <= adapter.whole_modules.copies.keys():
            first, second = (adapter.whole_modules.copy_of(root, adapter)._parameters for root in pair)
            if same_values(first["weight"], second["weight"]):
                second["weight"] = first["weight"]


def as_parameter(tensor: Tensor, device: torch.device, float32: bool, trainable: bool) -> nn.Parameter:
    """Return a tensor as a parameter on a device, in float32 if asked for."""
    dtype = torch.float32 if float32 and tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=trainable)


def same_values(first: Tensor | None, second: Tensor | None) -> bool:
    """Tell whether two tensors hold the same; those of a model without memory, as a merge on disk has, tell nothing."""
    if first is None or second is None or first.is_meta or second.is_meta:
        return False
    return first.dtype == second.dtype and torch.equal(first, second)
