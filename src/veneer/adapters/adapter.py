"""One adapter on a model: its config, what is known of it, and its parts, each with the tensors of one kind of place.

    LayerParts       shares of adapted layers, and the tensors that all of these use
    PromptPart       virtual tokens before the input, or in the cache
    WholeModules     copies of modules that it brings whole (``modules_to_save``)

A part holds layers and modules, and not the set of adapters: a cycle would keep a model that is dropped in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from veneer.adapters.prompts import Prompts
from veneer.base_model import sharding
from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.errors import MergeError
from veneer.files.tensor_keys import SHARED_PREFIX, encode
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.layers.module_copies import ModuleCopies
from veneer.layers.wrapping import LayerPlacement
from veneer.methods import method_of
from veneer.methods.base.abilities import ChangesWhenSaved, RefusesMerge, SharesTensors, saved_tensors
from veneer.patches.watched_parameters import leave_alone

NamedTensors = Iterable[tuple[str, Tensor]]


class Claim(NamedTuple):
    """Something that only one of the active adapters can have.

    Attributes:
        conflict: of two adapters that have it, completes "'a' and 'b' ...".
        remedy: how they can be used nevertheless.
    """

    conflict: str
    remedy: str = "Select one of them."


class AdapterPart(Protocol):
    """The tensors of an adapter in places of one kind. Each method is given the adapter that it is a part of."""

    def parameters(self, adapter: Adapter) -> Iterable[nn.Parameter]:
        """Return the parameters that are trained."""
        ...

    def named_tensors(self, adapter: Adapter, value: Callable[[Tensor], Tensor]) -> NamedTensors:
        """Return the tensors to be saved, made from what ``value`` gives for those in memory, by checkpoint key."""
        ...

    def tensors(self, adapter: Adapter) -> Iterable[Tensor]:
        """Return the tensors in memory that a checkpoint holds."""
        ...

    def tensors_by_place(self, adapter: Adapter) -> NamedTensors:
        """Return every tensor on the model, frozen ones included, by the name of its place."""
        ...

    def claims(self) -> Iterable[Claim]:
        """Return what no other active adapter can have beside this one."""
        ...

    def check_mergeable(self, adapter: Adapter) -> None:
        """Raise ``MergeError`` when the base's weights cannot hold it."""
        ...

    def take_settings(self, adapter: Adapter, other: Adapter) -> None:
        """Take the settings of another adapter, which is of the same method and in the same places."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give the tensors of the adapter ``old`` to the name ``new``."""
        ...

    def remove(self, adapter: Adapter, placement: LayerPlacement) -> None:
        """Take the tensors off the model, and the modules that then hold none."""
        ...


@dataclass
class LayerParts:
    """The shares that an adapter has of layers.

    Attributes:
        by_id: a site's id -> the adapters on it, in the model's order.
        zero: the ids of those in which the adapter changes nothing, known when it was loaded.
        shared: the tensors that all of its layers use.
        exclusive: whether no other such adapter can be active beside it.
    """

    by_id: dict[str, LayerAdapters] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    exclusive: bool = False

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

    def merged(self, name: str) -> list[str]:
        """Return the ids of the layers whose weights hold the adapter of that name now."""
        return [site_id for site_id, layer in self.by_id.items() if name in layer.merged]

    def parameters(self, adapter: Adapter) -> Iterator[nn.Parameter]:
        for layer, share in adapter.bound_layers():
            yield from (p for leaf, p in layer.tensors(adapter.name, share).items() if share.method.leaf(leaf).trained)
        method = method_of(adapter.config)
        if isinstance(method, SharesTensors):
            yield from (p for name, p in self.shared.items() if method.trains_shared(adapter.config, name))

    def named_tensors(self, adapter: Adapter, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for layer, share in adapter.bound_layers():
            if share.key is not None:
                tensors = {leaf: value(tensor) for leaf, tensor in layer.tensors(adapter.name, share).items()}
                saved = saved_tensors(share.method, share.settings, tensors)
                yield from ((encode(share.key, leaf), tensor) for leaf, tensor in saved.items())
        method = method_of(adapter.config)
        if isinstance(method, SharesTensors) and method.saves_shared(adapter.config):
            yield from ((SHARED_PREFIX + leaf, value(tensor)) for leaf, tensor in self.shared.items())

    def tensors(self, adapter: Adapter) -> Iterator[Tensor]:
        for layer, share in adapter.bound_layers():
            yield from layer.tensors(adapter.name, share).values()
        yield from self.shared.values()

    def tensors_by_place(self, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
        for layer in self.adapted:
            yield from ((f"{layer.site.id}.{place}", t) for place, t in layer.own_tensors(adapter.name).items())

    def claims(self) -> list[Claim]:
        return [_REPLACED_BASE] if self.exclusive else []

    def check_mergeable(self, adapter: Adapter) -> None:
        for layer in self:
            sharding.check_merge(layer.site.name, layer.site.module)
            for share in layer.bound[adapter.name]:
                if isinstance(share.method, RefusesMerge):
                    share.method.check_mergeable(share.settings, layer.site)
            if layer.site.groups > 1:
                layer.weight_patches([adapter.name])

    def take_settings(self, adapter: Adapter, other: Adapter) -> None:
        shares = [(layer, list(layer.bound[adapter.name]), layer.bound[other.name]) for layer in self]
        for layer, own, theirs in shares:
            for share, like in zip(own, theirs, strict=True):
                layer.reset(adapter.name, share, like.settings)
        self.zero = other.layers.zero

    def rename(self, old: str, new: str) -> None:
        for layer in self.adapted:
            layer.rename(old, new)

    def remove(self, adapter: Adapter, placement: LayerPlacement) -> None:
        self.leave(adapter, placement, self.names)

    def leave(self, adapter: Adapter, placement: LayerPlacement, site_ids: Iterable[str]) -> None:
        """Take the adapter off some of its layers."""
        for site_id in site_ids:
            layer = self.by_id[site_id]
            if isinstance(layer, AdaptedLayer) and adapter.name in layer.merged:
                layer.merge(tuple(name for name in layer.merged if name != adapter.name))
            layer.unbind(adapter.name)
            if not layer.bound:
                placement.remove_wrapper(site_id)
            del self.by_id[site_id]


_REPLACED_BASE = Claim(
    "each put another weight in the base's place (LoftQ)",
    "Select one of them, or load them on a base that is quantised.",
)


@dataclass
class PromptPart:
    """The virtual tokens of an adapter, which the model's prompts hold by its name."""

    prompts: Prompts

    def parameters(self, adapter: Adapter) -> list[nn.Parameter]:
        return self.prompts.encoder(adapter.name).trained()

    def named_tensors(self, adapter: Adapter, value: Callable[[Tensor], Tensor]) -> list[tuple[str, Tensor]]:
        return [(key, value(tensor)) for key, tensor in self.prompts.encoder(adapter.name).tensors().items()]

    def tensors(self, adapter: Adapter) -> Iterable[Tensor]:
        return self.prompts.encoder(adapter.name).tensors().values()

    def tensors_by_place(self, adapter: Adapter) -> list[tuple[str, Tensor]]:
        tensors = self.prompts.encoder(adapter.name).state_dict(keep_vars=True)
        return [(f"prompt.{leaf}", tensor) for leaf, tensor in tensors.items()]

    def claims(self) -> list[Claim]:
        return [_ONE_PROMPT]

    def check_mergeable(self, adapter: Adapter) -> None:
        raise MergeError(
            f"{adapter.origin or adapter.name} is a prompt ({adapter.config.peft_type}): it changes input or cache, "
            "and no weight could hold it.",
            hint="Use it unmerged; merge other adapters by name: merge_adapter([...]).",
        )

    def take_settings(self, adapter: Adapter, other: Adapter) -> None:
        self.prompts.configs[adapter.name] = self.prompts.configs[other.name]

    def rename(self, old: str, new: str) -> None:
        self.prompts.rename(old, new)

    def remove(self, adapter: Adapter, placement: LayerPlacement) -> None:
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

    def copy_of(self, root: str, adapter: Adapter) -> nn.Module:
        """Return the adapter's copy of a module."""
        copy: nn.Module = self.copies[root].copies[adapter.name]
        return copy

    def parameters(self, adapter: Adapter) -> Iterator[nn.Parameter]:
        for root in self.copies:
            if root not in self.untrained:
                yield from self.copy_of(root, adapter).parameters()

    def named_tensors(self, adapter: Adapter, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for root, leaf, tensor in self._leaves(adapter):
            yield encode(root, leaf, adapter.prefix), value(tensor)

    def tensors(self, adapter: Adapter) -> Iterator[Tensor]:
        return (tensor for _, _, tensor in self._leaves(adapter))

    def tensors_by_place(self, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
        return ((f"{root}.{leaf}", tensor) for root, leaf, tensor in self._leaves(adapter))

    def _leaves(self, adapter: Adapter) -> Iterator[tuple[str, str, Tensor]]:
        for root in self.copies:
            tensors = self.copy_of(root, adapter).state_dict(keep_vars=True)
            yield from ((root, leaf, tensor) for leaf, tensor in tensors.items())

    def claims(self) -> list[Claim]:
        return [Claim(f"both bring {root} whole") for root in self.copies]

    def check_mergeable(self, adapter: Adapter) -> None:
        """Nothing: a copy takes the place of its module."""

    def take_settings(self, adapter: Adapter, other: Adapter) -> None:
        self.untrained = other.whole_modules.untrained

    def rename(self, old: str, new: str) -> None:
        for copies in self.copies.values():
            copies.rename(old, new)

    def remove(self, adapter: Adapter, placement: LayerPlacement) -> None:
        for root, copies in self.copies.items():
            copies.remove(adapter.name)
            if not copies.copies:
                placement.remove_copies(root)


@dataclass
class Adapter:
    """One adapter on a model.

    Attributes:
        name: its name here.
        config: its config.
        origin: where it came from; ``None`` for one made here.
        trainable: whether its tensors are to be trained while it is selected.
        tensors_bound: how many of its checkpoint's tensors are in use.
        base_digest: the digest of the base it was trained on, where the checkpoint records it.
        notes: what was odd about it.
        unpadded: checkpoint key -> tensor, where what is in memory is padded and this is to be saved.
        allocation: what training has learned of an AdaLoRA's ranks, or of an AdaMSS's groups.
        saved_dtypes: checkpoint key -> dtype on disk, for tensors that are wider in memory and saved as they were.
        prompt: its virtual tokens, if it has any.
        layers: its shares of layers.
        whole_modules: the modules that it brings whole.
    """

    name: str
    config: AnyConfig
    origin: str | None = None
    trainable: bool = False
    tensors_bound: int = 0
    base_digest: str | None = None
    notes: list[str] = field(default_factory=list)
    unpadded: dict[str, Tensor] = field(default_factory=dict)
    allocation: Any = None
    saved_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    prompt: PromptPart | None = None
    layers: LayerParts = field(default_factory=LayerParts)
    whole_modules: WholeModules = field(default_factory=WholeModules)

    @property
    def parts(self) -> list[AdapterPart]:
        """Its parts, in the order in which a checkpoint has their tensors."""
        parts: list[AdapterPart] = [self.layers, self.whole_modules]
        return parts if self.prompt is None else [self.prompt, *parts]

    @property
    def virtual_tokens(self) -> int:
        """The number of tokens that it puts before the input or into the cache."""
        return 0 if self.prompt is None else self.prompt.prompts.tokens(self.name)

    @property
    def prefix(self) -> str:
        """The beginning of the checkpoint keys of modules that it brings whole."""
        return method_of(self.config).prefix

    def bound_layers(self) -> Iterator[tuple[LayerAdapters, BoundAdapter]]:
        """Yield each adapted layer with each of the adapter's shares of it."""
        return ((layer, share) for layer in self.layers for share in layer.bound[self.name])

    def wrappers(self) -> Iterator[tuple[str, AdaptedLayer | ModuleCopies]]:
        """Yield the modules that it changes: their names, and what stands in their places."""
        yield from ((layer.site.name, layer) for layer in self.layers.adapted)
        yield from self.whole_modules.copies.items()

    def parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is trained, once."""
        return list({id(p): p for part in self.parts for p in part.parameters(self)}.values())

    def named_tensors(self, value: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[tuple[str, Tensor]]:
        """Return each tensor that is saved: its checkpoint key, itself, or what ``value`` puts in its place."""
        return [named for part in self.parts for named in part.named_tensors(self, value)]

    def tensors_by_place(self) -> dict[str, Tensor]:
        """Return every tensor on the model, frozen ones included, by the name of its place."""
        return {place: tensor for part in self.parts for place, tensor in part.tensors_by_place(self)}

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of its tensors in memory."""
        return {tensor.dtype for part in self.parts for tensor in part.tensors(self)}

    def config_on_disk(self) -> AnyConfig:
        """Return the config that goes with :meth:`named_tensors`."""
        method = method_of(self.config)
        if not isinstance(method, ChangesWhenSaved) or all(
            leaf.saved for _, share in self.bound_layers() for leaf in share.leaves
        ):
            return self.config
        config: TargetedConfig = method.config_on_disk(self.config)
        return config

    def claims(self) -> Iterator[Claim]:
        """Yield what no other adapter can have while this one is active."""
        return (claim for part in self.parts for claim in part.claims())

    def check_mergeable(self) -> None:
        """Raise ``MergeError`` when the base's weights cannot hold it."""
        for part in self.parts:
            part.check_mergeable(self)

    def require_grad(self, required: bool) -> None:
        """Turn the gradients of its tensors on or off."""
        for parameter in self.parameters():
            parameter.requires_grad_(required)

    def watch(self) -> None:
        """Watch its tensors where they are not to be trained, and only then."""
        if self.trainable:
            leave_alone(self.parameters())
        for layer in () if self.trainable else self.layers.adapted:
            layer.watch()

    def note_zero_layers(self, known_to_change: Collection[str] = ()) -> None:
        """Find the layers in which it changes nothing; those in ``known_to_change`` need not be looked at."""
        self.layers.zero = [
            name
            for name, layer in self.layers.by_id.items()
            if name not in known_to_change and not any(patch.changes() for patch in layer.patches([self.name]))
        ]
