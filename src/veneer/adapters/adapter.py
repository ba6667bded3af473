"""One adapter on a model: what is known of it, and its parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter_part import AdapterPart, AdapterRecord, Claim
from veneer.adapters.parts import LayerParts, ModulesBeside, PromptPart, WholeModules
from veneer.configs.base import AnyConfig, TargetedConfig
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.layers.module_copies import ModuleCopies
from veneer.methods import method_of
from veneer.methods.base.abilities import ChangesWhenSaved
from veneer.patches.watched_parameters import detached, unwatch


@dataclass
class Adapter(AdapterRecord):
    """One adapter on a model.

    Attributes:
        prompt: its virtual tokens, if it has any.
        layers: its shares of layers.
        whole_modules: the modules that it brings whole.
        beside: the modules that it computes with beside the base's layers.
    """

    prompt: PromptPart | None = None
    layers: LayerParts = field(default_factory=LayerParts)
    whole_modules: WholeModules = field(default_factory=WholeModules)
    beside: ModulesBeside = field(default_factory=ModulesBeside)

    @property
    def parts(self) -> list[AdapterPart]:
        """Its parts, in the order in which a checkpoint has their tensors."""
        parts: list[AdapterPart] = [self.layers, self.beside, self.whole_modules]
        return parts if self.prompt is None else [self.prompt, *parts]

    @property
    def virtual_tokens(self) -> int:
        """The number of tokens that it puts before the input or into the cache."""
        return 0 if self.prompt is None else self.prompt.prompts.tokens(self.name)

    @property
    def shared(self) -> dict[str, Any]:
        """The tensors that all of its layers use, by the names of their leaves."""
        return {**self.layers.shared, **self.beside.shared(self.name)}

    def remake_modules(self) -> None:
        """Let the modules beside the base's layers be as the config says, which is another than before."""
        if self.beside.holders:
            self.beside.remake(self, [layer.site for layer in self.layers])

    def bound_layers(self) -> Iterator[tuple[LayerAdapters, BoundAdapter]]:
        """Yield each adapted layer with each of the adapter's shares of it."""
        return self.layers.bound(self.name)

    def wrappers(self) -> Iterator[tuple[str, AdaptedLayer | ModuleCopies]]:
        """Yield the names of the modules that it changes, with their wrappers."""
        yield from ((layer.site.name, layer) for layer in self.layers.adapted)
        yield from self.whole_modules.copies.items()

    @property
    def trains_biases(self) -> bool:
        """True if it trains biases of the base's layers."""
        return self.trainable and getattr(self.config, "bias", "none") != "none"

    def parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is trained, once."""
        return list({id(p): p for part in self.parts for p in part.parameters(self)}.values())

    def named_tensors(self, value: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[tuple[str, Tensor]]:
        """Return each tensor that is saved: its checkpoint key, itself, or what ``value`` puts in its place."""
        return [named for part in self.parts for named in part.named_tensors(self, value)]

    def tensors_by_place(self) -> dict[str, Tensor]:
        """Return every tensor on the model, frozen ones included, by the name of its place."""
        return {place: tensor for part in self.parts for place, tensor in part.tensors_by_place(self)}

    @property
    def nbytes(self) -> int:
        """The memory that its tensors take, what several share counted once."""
        storages = [detached(tensor).untyped_storage() for tensor in self.tensors_by_place().values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of its tensors in memory."""
        return {tensor.dtype for part in self.parts for tensor in part.tensors(self)}

    def config_on_disk(self) -> AnyConfig:
        """Return the config that goes with :meth:`named_tensors`."""
        config, method = self.saved_config or self.config, method_of(self.config)
        if not isinstance(method, ChangesWhenSaved) or all(
            leaf.saved for _, share in self.bound_layers() for leaf in share.leaves
        ):
            return config
        changed: TargetedConfig = method.config_on_disk(config)
        return changed

    def claims(self) -> Iterator[Claim]:
        """Yield the claims that no other adapter can have while this one is active."""
        return (claim for part in self.parts for claim in part.claims(self))

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
            unwatch(self.parameters())
        for layer in () if self.trainable else self.layers.adapted:
            layer.watch()

    @property
    def changes_something(self) -> bool:
        """False for one of layers alone that changes none of them, known when it was loaded."""
        has_more = self.prompt is not None or self.whole_modules.copies or self.beside.holders
        return bool(has_more) or len(self.layers.zero) < len(self.layers.by_id)

    def note_zero_layers(self, known_to_change: Collection[str] = ()) -> None:
        """Find the layers in which it changes nothing; those in ``known_to_change`` need not be looked at."""
        self.layers.zero = [
            name
            for name, layer in self.layers.by_id.items()
            if name not in known_to_change and not any(patch.changes() for patch in layer.patches([self.name]))
        ]
