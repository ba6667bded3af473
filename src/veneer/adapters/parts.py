"""The parts of an adapter, each with its tensors in places of one kind.

    LayerParts       shares of adapted layers, and the tensors that all of these use
    PromptPart       virtual tokens before the input, or in the cache
    WholeModules     copies of modules that it brings whole (``modules_to_save``)
    ModulesBeside    modules that it computes with beside the base's layers

A part holds layers and modules, and not the set of adapters: a cycle would keep a model that is dropped in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from veneer.adapters.adapter_part import AdapterRecord, Claim
from veneer.adapters.prompts import Prompts
from veneer.base_model import sharding
from veneer.base_model.sites.site import Site
from veneer.errors import NoMergedFormError
from veneer.files.tensor_keys import SHARED_PREFIX, encode
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.layers.any_names import Copies
from veneer.layers.module_copies import ModuleCopies
from veneer.layers.wrapping import LayerPlacement
from veneer.methods import method_of
from veneer.methods.base.abilities import (
    ChangesWhenSaved,
    HoldsModules,
    RefusesMerge,
    SharesTensors,
    module_leaf,
    saved_tensors,
)
from veneer.methods.shared.token_rows import LoraTokens


@dataclass
class LayerParts:
    """The shares that an adapter has of layers.

    Attributes:
        by_id: a site's id -> the adapters on it, in the model's order.
        zero: the ids of those in which the adapter changes nothing, known when it was loaded.
        shared: the tensors that all of its layers use.
        exclusive: True where no other such adapter can be active beside it.
        idle: the ids of those that hold zeros, because the adapter that was swapped in has nothing there.
    """

    by_id: dict[str, LayerAdapters] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    exclusive: bool = False
    idle: Collection[str] = ()

    @property
    def names(self) -> list[str]:
        """The ids of the sites."""
        return list(self.by_id)

    @property
    def adapted(self) -> list[AdaptedLayer]:
        """The layers that stand in the model: all but those that are merged while loading."""
        return [layer for layer in self if isinstance(layer, AdaptedLayer)]

    def __iter__(self) -> Iterator[LayerAdapters]:
        return iter(self.by_id.values())

    def __len__(self) -> int:
        return len(self.by_id)

    def bound(self, name: str) -> Iterator[tuple[LayerAdapters, BoundAdapter]]:
        """Yield each layer with each share of it that the adapter of that name has."""
        return ((layer, share) for layer in self for share in layer.bound[name])

    def merged(self, name: str) -> list[str]:
        """Return the ids of the layers whose weights hold the adapter of that name now."""
        return [site_id for site_id, layer in self.by_id.items() if name in layer.merged]

    def parameters(self, adapter: AdapterRecord) -> Iterator[nn.Parameter]:
        for layer, share in self.bound(adapter.name):
            yield from (p for leaf, p in layer.tensors(adapter.name, share).items() if share.method.leaf(leaf).trained)
        method = method_of(adapter.config)
        if isinstance(method, SharesTensors):
            yield from (p for name, p in self.shared.items() if method.trains_shared(adapter.config, name))

    def named_tensors(self, adapter: AdapterRecord, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        method = method_of(adapter.config)
        as_it_is = isinstance(method, ChangesWhenSaved) and method.saves_as_it_is(adapter.config)
        for layer, share in self.bound(adapter.name):
            if share.key is not None and layer.site.id not in self.idle:
                own = layer.tensors(adapter.name, share).items()
                tensors = {leaf: value(t) for leaf, t in own if share.method.leaf(leaf).saved or not as_it_is}
                saved = saved_tensors(share.method, share.settings, tensors)
                yield from ((encode(share.key, leaf), tensor) for leaf, tensor in saved.items())
        if isinstance(method, SharesTensors) and method.saves_shared(adapter.config):
            yield from ((SHARED_PREFIX + leaf, value(tensor)) for leaf, tensor in self.shared.items())

    def tensors(self, adapter: AdapterRecord) -> Iterator[Tensor]:
        for layer, share in self.bound(adapter.name):
            yield from layer.tensors(adapter.name, share).values()
        yield from self.shared.values()

    def tensors_by_place(self, adapter: AdapterRecord) -> Iterator[tuple[str, Tensor]]:
        for layer in self.adapted:
            yield from ((f"{layer.site.id}.{place}", t) for place, t in layer.own_tensors(adapter.name).items())

    def place_biases(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Let the biases that the adapter of that name trains be the base's own, but for those that layers share."""
        leaves = (module for module in modules if not module._modules)
        users = Counter(id(module._parameters.get("bias")) for module in leaves)
        for layer in self.adapted:
            if layer.trains_bias(name) and layer.can_place_bias() and users[id(layer.own_bias)] <= 1:
                layer.place_bias(name)

    def claims(self, adapter: AdapterRecord) -> Iterator[Claim]:
        if self.exclusive:
            yield _REPLACED_BASE
        for layer, share in self.bound(adapter.name):
            if isinstance(share.method, LoraTokens):
                yield from (_row(token, layer.site.name) for token in share.settings.index.tolist())

    def check_mergeable(self, adapter: AdapterRecord) -> None:
        for layer in self:
            sharding.check_merge(layer.site.name, layer.site.module)
            for share in layer.bound[adapter.name]:
                if isinstance(share.method, RefusesMerge):
                    share.method.check_mergeable(share.settings, layer.site)
            if layer.site.groups > 1:
                layer.weight_patches([adapter.name])

    def take_settings(self, name: str, other: LayerParts, other_name: str) -> None:
        for layer in self:
            for share, like in zip(list(layer.bound[name]), layer.bound[other_name], strict=True):
                layer.reset(name, share, like.settings)
        self.zero = other.zero

    def rename(self, old: str, new: str) -> None:
        for layer in self.adapted:
            layer.rename(old, new)

    def remove(self, adapter: AdapterRecord, placement: LayerPlacement) -> None:
        self.leave(adapter, placement, self.names)

    def leave(self, adapter: AdapterRecord, placement: LayerPlacement, site_ids: Iterable[str]) -> None:
        """Take the adapter off some of its layers."""
        for site_id in site_ids:
            layer = self.by_id[site_id]
            if isinstance(layer, AdaptedLayer) and adapter.name in layer.merged:
                layer.merge_adapters(tuple(name for name in layer.merged if name != adapter.name))
            layer.unbind(adapter.name)
            if not layer.bound:
                placement.remove_wrapper(site_id)
            del self.by_id[site_id]


_REPLACED_BASE = Claim(
    "each put another weight in the base's place (LoftQ)",
    "Select one of them, or load them on a base that is quantised.",
)


def _row(token: int, layer: str) -> Claim:
    """Return the claim on the row of a token, of which a layer can have one only."""
    conflict = f"both train token {token} of {layer} (Only one adapter can be set at a time for TrainableTokensWrapper)"
    remedy = (
        "Select one of them: two sets of values are already defined and would result in undefined merging behavior."
    )
    return Claim(conflict, remedy)


@dataclass
class PromptPart:
    """The virtual tokens of an adapter, which the model's prompts hold by its name."""

    prompts: Prompts

    def parameters(self, adapter: AdapterRecord) -> list[nn.Parameter]:
        return self.prompts.encoder(adapter.name).trained()

    def named_tensors(self, adapter: AdapterRecord, value: Callable[[Tensor], Tensor]) -> list[tuple[str, Tensor]]:
        return [(key, value(tensor)) for key, tensor in self.prompts.encoder(adapter.name).tensors().items()]

    def tensors(self, adapter: AdapterRecord) -> Iterable[Tensor]:
        return self.prompts.encoder(adapter.name).tensors().values()

    def tensors_by_place(self, adapter: AdapterRecord) -> list[tuple[str, Tensor]]:
        tensors = self.prompts.encoder(adapter.name).state_dict(keep_vars=True)
        return [(f"prompt.{leaf}", tensor) for leaf, tensor in tensors.items()]

    def claims(self, adapter: AdapterRecord) -> list[Claim]:
        return [_ONE_PROMPT]

    def check_mergeable(self, adapter: AdapterRecord) -> None:
        raise NoMergedFormError(
            f"{adapter.origin or adapter.name} is a prompt ({adapter.config.peft_type}): it changes input or cache, "
            "and no weight could hold it.",
            hint="Use it unmerged; merge other adapters by name: merge_adapter([...]).",
        )

    def take_settings(self, name: str, other: PromptPart, other_name: str) -> None:
        self.prompts.configs[name] = self.prompts.configs[other_name]

    def rename(self, old: str, new: str) -> None:
        self.prompts.rename(old, new)

    def remove(self, adapter: AdapterRecord, placement: LayerPlacement) -> None:
        self.prompts.remove(adapter.name)


_ONE_PROMPT = Claim("are prompts", "Select one of them, or give each row of a batch its own with adapter_names=[...].")


@dataclass
class WholeModules:
    """The copies of modules that an adapter brings.

    Attributes:
        copies: a module's name -> what holds the copies of it.
        untrained: the names of those that are no part of the adapter and are never trained: a grown vocabulary's rows.
    """

    copies: dict[str, ModuleCopies] = field(default_factory=dict)
    untrained: Collection[str] = ()

    @property
    def names(self) -> list[str]:
        """The names of the modules."""
        return list(self.copies)

    def copy_of(self, root: str, adapter: AdapterRecord) -> nn.Module:
        """Return the adapter's copy of a module."""
        copy: nn.Module = self.copies[root].copies[adapter.name]
        return copy

    def parameters(self, adapter: AdapterRecord) -> Iterator[nn.Parameter]:
        for root in self.copies:
            if root not in self.untrained:
                yield from self.copy_of(root, adapter).parameters()

    def named_tensors(self, adapter: AdapterRecord, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for root, leaf, tensor in self._leaves(adapter):
            yield encode(root, leaf, adapter.prefix), value(tensor)

    def tensors(self, adapter: AdapterRecord) -> Iterator[Tensor]:
        return (tensor for _, _, tensor in self._leaves(adapter))

    def tensors_by_place(self, adapter: AdapterRecord) -> Iterator[tuple[str, Tensor]]:
        return ((f"{root}.{leaf}", tensor) for root, leaf, tensor in self._leaves(adapter))

    def _leaves(self, adapter: AdapterRecord) -> Iterator[tuple[str, str, Tensor]]:
        for root in self.copies:
            tensors = self.copy_of(root, adapter).state_dict(keep_vars=True)
            yield from ((root, leaf, tensor) for leaf, tensor in tensors.items())

    def claims(self, adapter: AdapterRecord) -> list[Claim]:
        remedy = "Only one adapter can be set at a time for ModulesToSaveWrapper: select one of them."
        return [Claim(f"both bring {root} whole", remedy) for root in self.copies]

    def check_mergeable(self, adapter: AdapterRecord) -> None:
        """Nothing: a copy takes the place of its module."""

    def take_settings(self, name: str, other: WholeModules, other_name: str) -> None:
        self.untrained = other.untrained

    def rename(self, old: str, new: str) -> None:
        for copies in self.copies.values():
            copies.rename(old, new)

    def remove(self, adapter: AdapterRecord, placement: LayerPlacement) -> None:
        for root, copies in self.copies.items():
            copies.remove(adapter.name)
            if not copies.copies:
                placement.remove_copies(root)


@dataclass
class ModulesBeside:
    """The modules that an adapter computes with beside the base's layers; they hold the tensors that its layers share.

    Attributes:
        holders: a name in the base model -> what holds the modules there, by their adapters' names.
    """

    holders: dict[str, Copies] = field(default_factory=dict)

    def place(self, name: str, modules: Mapping[str, nn.Module | None], placement: LayerPlacement) -> None:
        """Put the modules of the adapter ``name`` into the base model; a place for each that it has not."""
        for kind, module in modules.items():
            self.holders[kind] = placement.hold_beside(kind)
            if module is not None:
                self.holders[kind]._modules[name] = module

    def remake(self, adapter: AdapterRecord, sites: Sequence[Site]) -> None:
        """Put modules of an adapter's config into the places of those that it has, with the same tensors."""
        method = method_of(adapter.config)
        if isinstance(method, HoldsModules):
            for kind, module in method.modules(adapter.config, sites, self.shared(adapter.name)).items():
                if module is not None:
                    self.holders[kind]._modules[adapter.name] = module

    def modules(self, name: str) -> dict[str, nn.Module]:
        """Return the modules of the adapter ``name``."""
        modules = {kind: holder._modules.get(name) for kind, holder in self.holders.items()}
        return {kind: module for kind, module in modules.items() if module is not None}

    def shared(self, name: str) -> dict[str, Any]:
        """Return the tensors by the names of their shared leaves, as the modules hold them now."""
        return {
            module_leaf(kind, leaf): tensor
            for kind, module in self.modules(name).items()
            for leaf, tensor in module.state_dict(keep_vars=True).items()
        }

    def parameters(self, adapter: AdapterRecord) -> Iterator[nn.Parameter]:
        method = method_of(adapter.config)
        if isinstance(method, HoldsModules):
            tensors = self.shared(adapter.name).items()
            yield from (p for leaf, p in tensors if method.trains_shared(adapter.config, leaf))

    def named_tensors(self, adapter: AdapterRecord, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        return ((SHARED_PREFIX + leaf, value(tensor)) for leaf, tensor in self.shared(adapter.name).items())

    def tensors(self, adapter: AdapterRecord) -> Iterable[Tensor]:
        return self.shared(adapter.name).values()

    def tensors_by_place(self, adapter: AdapterRecord) -> Iterable[tuple[str, Tensor]]:
        return self.shared(adapter.name).items()

    def claims(self, adapter: AdapterRecord) -> list[Claim]:
        return []

    def check_mergeable(self, adapter: AdapterRecord) -> None:
        """Do nothing, for the layers that read their states refuse it."""

    def take_settings(self, name: str, other: ModulesBeside, other_name: str) -> None:
        """Do nothing, for modules are made anew of the config: see :meth:`remake`."""

    def rename(self, old: str, new: str) -> None:
        for kind in self.modules(old):
            self.holders[kind]._modules[new] = self.holders[kind]._modules.pop(old)

    def remove(self, adapter: AdapterRecord, placement: LayerPlacement) -> None:
        for kind in self.modules(adapter.name):
            del self.holders[kind]._modules[adapter.name]
        placement.drop_beside()
