"""Bringing an adapter's tensors onto the layers of a model: read from a checkpoint, or new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.attaching import Attaching, as_parameter, same_values
from veneer.adapters.collection import Adapters
from veneer.adapters.expert_names import name_experts
from veneer.adapters.experts import check_experts
from veneer.adapters.idle_names import warn_of_idle_names
from veneer.adapters.one_copy import copied_in_one
from veneer.base_model import sharding
from veneer.base_model.sites.site import Site
from veneer.base_model.tied_embeddings import check_both, pairs_kept_tied, parted
from veneer.checkpoints.binding_plan import Binding, Plan
from veneer.configs.base import targeted
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.methods import AnyMethod, method_of
from veneer.methods.base.abilities import (
    AdaptsTwins,
    ChangesWhenSaved,
    CompletesConfig,
    DerivesTensors,
    Exclusive,
    HoldsModules,
    SharesBetweenLayers,
    SharesTensors,
    TiesEmbeddings,
    saved_tensors,
    settings_by_tensors,
)
from veneer.methods.base.method import MethodOnSites, NewLayer
from veneer.methods.base.parts import parts_of
from veneer.methods.shared.token_rows import check_not_whole

# Devices to which copying many tensors takes no longer than copying one.
_NOT_WAITED_FOR = frozenset({"cpu", "meta"})


@dataclass(frozen=True)
class PendingLayer:
    """Holds an adapter's share of a layer that is about to be bound.

    Attributes:
        site: the layer.
        method: lowers the tensors.
        settings: the config's meaning for the layer.
        tensors: name -> parameter.
        twins: other layers that use the same tensors.
    """

    site: Site
    method: AnyMethod
    settings: Any
    tensors: dict[str, nn.Parameter]
    twins: Sequence[Site]


class AttachingLayers(Attaching):
    """Brings an adapter that has shares of layers onto a model.

    Attributes:
        method: the adapter's own; biases, and embeddings saved whole, have others.
        pending: the shares that are ready, until they are bound.
        shared: the tensors that all layers use.
        modules: the modules that hold these, where the method computes with such.
    """

    def __init__(self, adapters: Adapters, adapter: Adapter, float32: bool) -> None:
        super().__init__(adapters, adapter, float32)
        self.config = targeted(adapter.config)
        self.method = method_of(self.config)
        self.pending: list[PendingLayer] = []
        self.shared: dict[str, nn.Parameter] = {}
        self.modules: dict[str, nn.Module | None] = {}
        # The id of a site -> what joins the layer's own tensors there.
        self._extra: dict[str, Mapping[str, Tensor]] = {}

    def complete_config(self) -> None:
        if self.config.experts:
            check_experts(self.config, self.adapters)

    def check_tied(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        if not self.adapter.trainable:
            return
        pairs = pairs_kept_tied(self.config, self.adapters.catalog)
        adapted = [binding.site.name for binding in plan.bindings if binding.method is self.method]
        check_both(pairs, [*adapted, *plan.whole_modules])
        for pair in pairs:
            if set(pair) <= plan.whole_modules.keys():
                embedding, output = (tensors[plan.whole_modules[root]["weight"]] for root in pair)
                if not same_values(embedding, output):
                    raise parted(pair)

    def restore(self, plan: Plan, tensors: dict[str, Tensor]) -> None:
        tensors = self._placed_together(plan, tensors)
        self.pending = [self._restored(binding, tensors) for binding in plan.bindings]
        self._tie_outputs(new=False)
        self._share({name: tensors[key] for name, key in plan.shared.items()}, None)
        self._bind()

    def create(self, roots: list[str], generator: torch.Generator | None) -> None:
        for part in self._new_parts(roots):
            twins = part.twins
            self.pending += [self._new(part.method, site, twins.get(site.id, ()), generator) for site in part.sites]
        self._share({}, generator)
        self._take_extra_tensors()
        self._tie_outputs(new=True)
        if self.adapters.is_spread:
            sharding.agree([*(t for layer in self.pending for t in layer.tensors.values()), *self.shared.values()])
        if not self.float32:
            self._narrow()
        self._bind()

    def _placed_together(self, plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, on the layers' device where one copy takes all of them there."""
        devices = {binding.site.device for binding in plan.bindings}
        own = {key: tensors[key] for binding in plan.bindings for key in binding.keys.values()}
        # What is trained gets memory of its own, which wrappers of training may free or replace.
        if self.adapter.trainable or len(devices) != 1 or any(not tensor.is_cpu for tensor in own.values()):
            return tensors
        device = devices.pop()
        return tensors if device.type in _NOT_WAITED_FOR else {**tensors, **copied_in_one(own, device)}

    # -- tensors of a layer --------------------------------------------------------------------------------

    def _restored(self, binding: Binding, tensors: Mapping[str, Tensor]) -> PendingLayer:
        site, method, trainable = binding.site, binding.method, self.adapter.trainable
        device = site.device
        parameters = {
            name: as_parameter(tensors[key], device, self.float32, trainable and method.leaf(name).trained)
            for name, key in binding.keys.items()
        }
        if isinstance(method, ChangesWhenSaved):
            recomputed = method.recomputed(self.config, binding.settings, lambda: self.adapters.base(site))
            parameters.update((n, as_parameter(tensor, device, True, False)) for n, tensor in recomputed.items())
        return PendingLayer(site, method, binding.settings, parameters, binding.twins)

    def _new_parts(self, roots: list[str]) -> list[MethodOnSites]:
        """Complete the config, and return the layers of a new adapter, once it is sure that it can be on them."""
        config, catalog = self.config, self.adapters.catalog
        if isinstance(self.method, CompletesConfig):
            self.method.complete(config, catalog)
        given = copy(config)
        experts = name_experts(config, catalog, self._check_can_start)
        # The layers' names take the place of "all-linear" before anything else depends on them.
        if layers := catalog.targets(config):
            catalog.write_out_targets(config, layers)
        parts = [part for part in parts_of(self.method, config, catalog) if not part.optional]
        sites = [site for part in parts for site in part.sites]
        check_not_whole(parts, roots)
        warn_of_idle_names(given, catalog, experts, sites)
        self.adapters.check_spread(sites, roots)
        self.adapters.check_places([site.name for site in sites], roots)
        return parts

    def _check_can_start(self, site: Site) -> None:
        """Raise where a new adapter of the config cannot be on a site."""
        sharding.check_site(site)
        self.method.check_site(site)
        settings = self.method.settings(self.config, site)
        if isinstance(getattr(self.config, "init_lora_weights", None), str):
            self.method.init(NewLayer(self.config, settings, self.adapters.base(site), torch.Generator()))

    def _new(
        self, method: AnyMethod, site: Site, twins: Sequence[Site], generator: torch.Generator | None
    ) -> PendingLayer:
        method.check_site(site)
        settings = method.settings(self.config, site)
        tensors = method.init(NewLayer(self.config, settings, self.adapters.base(site), generator))
        parameters = {
            name: as_parameter(tensor, site.device, True, method.leaf(name).trained) for name, tensor in tensors.items()
        }
        return PendingLayer(site, method, settings, parameters, twins)

    def _narrow(self) -> None:
        """Give new tensors the dtype of the layers that they are for, where that is a half-precision one."""
        for place, layer in enumerate(self.pending):
            dtype = layer.site.stored.dtype
            if dtype in (torch.float16, torch.bfloat16):
                for parameter in (*layer.tensors.values(), *(() if place else self.shared.values())):
                    parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data

    # -- tensors of several layers -------------------------------------------------------------------------

    @property
    def _own_layers(self) -> list[PendingLayer]:
        """The layers of the adapter's own method."""
        return [layer for layer in self.pending if layer.method is self.method]

    def _share(self, stored: Mapping[str, Tensor], generator: torch.Generator | None) -> None:
        """Take the tensors that all layers use from the checkpoint, or make them; then derive what joins each layer."""
        method, layers = self.method, self._own_layers
        if not layers or not isinstance(method, (SharesTensors, DerivesTensors)):
            return
        bases = [self.adapters.base(layer.site) for layer in layers]
        if isinstance(method, SharesTensors):
            missing = method.shared_shapes(self.config, [layer.site for layer in layers]).keys() - stored.keys()
            fresh = method.make_shared(self.config, bases, generator) if missing else {}
            self.shared = {
                name: as_parameter(
                    tensor, layers[0].site.device, self.float32, self.adapter.trainable and self._may_train_shared(name)
                )
                for name, tensor in {**fresh, **stored}.items()
            }
        if isinstance(method, HoldsModules):
            self.modules = method.modules(self.config, [layer.site for layer in layers], self.shared)
            return
        extra: Sequence[Mapping[str, Tensor]] = [self.shared] * len(layers)
        if isinstance(method, DerivesTensors):
            extra = method.extra_tensors(self.config, bases, self.shared)
        self._extra = {layer.site.id: tensors for layer, tensors in zip(layers, extra, strict=True)}

    def _may_train_shared(self, name: str) -> bool:
        return isinstance(self.method, SharesTensors) and self.method.trains_shared(self.config, name)

    def _take_extra_tensors(self) -> None:
        """Give new layers those of their tensors that their method derives instead of making them."""
        for layer in self._own_layers:
            extra = self._extra.get(layer.site.id, {})
            needed = layer.method.shapes(layer.settings, layer.site).keys() - layer.tensors.keys()
            layer.tensors.update(
                (leaf.name, as_parameter(extra[leaf.name], layer.site.device, True, leaf.trained))
                for leaf in layer.method.leaves
                if leaf.name in needed & extra.keys()
            )

    def _share_between_layers(self) -> None:
        """Let layers use another's tensor where their method shares it."""
        if not isinstance(self.method, SharesBetweenLayers):
            return
        layers = self._own_layers
        for name, leaders in self.method.shared_between_layers(self.config, [layer.site for layer in layers]).items():
            for layer, leader in zip(layers, leaders, strict=True):
                layer.tensors[name] = layers[leader].tensors[name]

    def _tie_outputs(self, *, new: bool) -> None:
        """Let output layers use the tensors of the embeddings that they are to stay like; loaded ones if equal.

        Raises:
            UnsupportedError: they are to be trained, and cannot be changed alike.
        """
        places = {layer.site.name: place for place, layer in enumerate(self.pending) if layer.method is self.method}
        for pair in pairs_kept_tied(self.config, self.adapters.catalog):
            if not places.keys() >= set(pair):
                continue
            embedding, output = (self.pending[places[name]] for name in pair)
            tied = self._tied(embedding, output)
            if tied is not None and (new or _saves_as(tied, output)):
                self.pending[places[pair[1]]] = tied
            elif self.adapter.trainable and not output.site.looks_up:
                raise parted(pair)  # peft itself lets the encoder's and the decoder's embedding part

    def _tied(self, embedding: PendingLayer, output: PendingLayer) -> PendingLayer | None:
        """Return the output layer with the embedding's tensors, where the method can do so."""
        if not isinstance(self.method, TiesEmbeddings):
            return None
        settings = self.method.tied_output_settings(embedding.settings, output.settings)
        if settings is not None and output.site.looks_up:
            settings = output.settings  # another embedding, such as the decoder's, uses the tensors as they are
        return None if settings is None else replace(output, settings=settings, tensors=dict(embedding.tensors))

    # -- binding -------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Put tensors that are ready into their layers; from here on nothing can fail."""
        self._share_between_layers()
        self.adapter.beside.place(self.adapter.name, self.modules, self.adapters)
        if self.shared and not self.modules:
            self.adapter.layers.shared = self.shared
            self._hold_shared(self.adapters.wrap(self.pending[0].site))
        for pending in self.pending:
            self._bind_layer(pending)
        self.adapter.layers.exclusive = any(isinstance(pending.method, Exclusive) for pending in self.pending)

    def _hold_shared(self, layer: LayerAdapters) -> None:
        trained = [name for name in self.shared if self._may_train_shared(name)]
        saved = isinstance(self.method, SharesTensors) and self.method.saves_shared(self.config)
        layer.hold(self.adapter.name, self.shared, trained, saved)

    def _bind_layer(self, pending: PendingLayer) -> None:
        name, method, tensors = self.adapter.name, pending.method, pending.tensors
        layer = self.adapters.wrap(pending.site)
        settings = settings_by_tensors(method, pending.settings, tensors, layer)
        # The adapter's own method alone has extra tensors; its companions (biases ...) have none.
        extra = self._extra.get(pending.site.id, {}) if method is self.method else {}
        joining = _frozen(extra, tensors, pending.site)
        derived = {k: t for k, t in joining.items() if not any(t is s for s in self.shared.values())}
        layer.hold(name, derived, saved=False)
        leaves = tuple(map(method.leaf, tensors))
        layer.bind(name, BoundAdapter(method, settings, leaves, pending.site.key, joining), tensors)
        self.adapter.layers.by_id[pending.site.id] = layer
        if not isinstance(method, AdaptsTwins):
            return
        for twin in pending.twins:
            twin_settings = method.twin_settings(settings, twin)
            if twin_settings is not None:
                layer = self.adapter.layers.by_id[twin.id] = self.adapters.wrap(twin)
                key = twin.key if method.saves_twins else None
                layer.bind(name, BoundAdapter(method, twin_settings, leaves, key), tensors)


def _saves_as(layer: PendingLayer, stored: PendingLayer) -> bool:
    """Tell whether saving a layer's tensors gives those of another, which come from a checkpoint."""
    saved = saved_tensors(layer.method, layer.settings, layer.tensors)
    return saved.keys() == stored.tensors.keys() and all(same_values(saved[k], t) for k, t in stored.tensors.items())


def _frozen(extra: Mapping[str, Tensor], tensors: Mapping[str, Tensor], site: Site) -> dict[str, nn.Parameter]:
    """Return what joins a layer's own tensors, as parameters; those that are some already are used as they are."""
    return {
        name: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.to(site.device), requires_grad=False)
        for name, tensor in extra.items()
        if name not in tensors
    }
