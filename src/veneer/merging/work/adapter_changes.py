"""Binds adapters to the skeleton of a base on disk exactly as to a live model, by the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapters.attach import load
from veneer.adapters.collection import Adapters
from veneer.adapters.merge.in_memory import check_mergeable
from veneer.base_model.catalog import Catalog
from veneer.base_model.sites.parameter_reader import ParameterReader
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.layouts.older_layouts import in_current_layout
from veneer.errors import MergeError
from veneer.files.tensor_keys import encode
from veneer.layers.adapter_shares import LayerAdapters
from veneer.patches.patch import Patch


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter to merge: its checkpoint, and the factor of its change."""

    checkpoint: Checkpoint
    weight: float = 1.0


@dataclass
class AdapterChanges:
    """All changes that a merge makes.

    Attributes:
        layers: id of a site -> the adapters' tensors bound to it.
        weights: adapter's name -> the factor of its change, in the order in which the adapters apply.
        origins: adapter's name -> its path or id.
        replacements: parameter or buffer -> the adapter's tensor that takes its place.
        whole_modules: the modules that come whole.
        notes: harmless oddities of the adapters.
    """

    layers: dict[str, LayerAdapters] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    whole_modules: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def parts(self, site_id: str) -> list[tuple[object, list[Tensor]]]:
        """List the adapters and methods that change a site, and the tensors of each."""
        layer = self.layers[site_id]
        return [
            ((name, type(share.method)), list(layer.tensors(name, share).values()))
            for name in layer.here(tuple(self.weights))
            for share in layer.bound[name]
        ]

    @torch.no_grad()
    def patches(self, site_id: str) -> list[Patch]:
        """Return the patches that the adapters apply to a site, in order."""
        layer = self.layers[site_id]
        return [
            self._weighted(patch, name, site_id)
            for name in layer.here(tuple(self.weights))
            for patch in layer.patches([name])
        ]

    def _weighted(self, patch: Patch, name: str, site_id: str) -> Patch:
        weight = self.weights[name]
        scaled = patch if weight == 1.0 else patch.scaled(weight)
        if scaled is None:
            raise MergeError(
                f"{self.origins[name]} is to be merged with weight {weight:g}, and its change of {site_id} is no sum: "
                "a share of it is not defined.",
                hint="A weight other than 1 is for adapters that add to the weights, as LoRA does.",
            )
        return scaled


def bind_adapters(
    adapters: Sequence[WeightedAdapter], model: nn.Module, reader: ParameterReader, strict: bool
) -> AdapterChanges:
    """Bind adapters to a base's skeleton, in their order, and unload them from it again.

    Raises:
        BindError: an adapter and the base do not fit. NonFiniteError: an adapter holds NaN or infinity.
        AdapterError: two bring the same module whole. MergeError: one has no merged form.
    """
    bound = Adapters(model)
    bound.catalog = Catalog(model, reader)
    changes = AdapterChanges()
    for index, adapter in enumerate(adapters):
        name, checkpoint = f"adapter{index}", in_current_layout(adapter.checkpoint, bound.catalog)
        loaded = load(bound, name, checkpoint, trainable=False, strict=strict)
        changes.weights[name], changes.origins[name] = adapter.weight, checkpoint.origin
        changes.notes += loaded.notes
        for root in loaded.whole_modules.names:
            _check_whole(adapter, root)
            changes.whole_modules.append(root)
            changes.replacements.update(_tensors_of(checkpoint, root, bound.module_copies[root].original_module))
    bound.selection(list(changes.weights))
    check_mergeable(bound, list(changes.weights))
    changes.layers = dict(bound.layers)
    bound.unload()
    return changes


def _tensors_of(checkpoint: Checkpoint, root: str, module: nn.Module) -> Mapping[str, Tensor]:
    """Read the parameters and buffers of a module that comes whole, by their names in the model."""
    keys = {encode(root, leaf): f"{root}.{leaf}" for leaf in module.state_dict(keep_vars=True)}
    return {keys[key]: tensor for key, tensor in checkpoint.read(keys).items()}


def _check_whole(adapter: WeightedAdapter, root: str) -> None:
    if adapter.weight != 1.0:
        raise MergeError(
            f"{adapter.checkpoint.origin} is to be merged with weight {adapter.weight:g}, and it brings {root} whole: "
            "a share of a module is not defined.",
            hint="Give it weight 1, or train without modules_to_save.",
        )


def tie_groups(model: nn.Module) -> list[list[str]]:
    """List the parameters that several modules share: the names of each."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def module_id(model: nn.Module, name: str) -> int:
    """Return the id of the module that holds a parameter; the same for each of the parameter's names."""
    return id(model.get_submodule(name.rpartition(".")[0]))
