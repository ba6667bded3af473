"""Adding an adapter to a model: from its checkpoint, or a new one from its config. All of it is added, or nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter, PromptPart
from veneer.adapters.collection import Adapters
from veneer.adapters.expert_names import name_experts, warn_of_idle_names
from veneer.adapters.experts import check_experts
from veneer.adapters.guard import guarded
from veneer.adapters.prompt_sizes import complete
from veneer.base_model import sharding
from veneer.base_model.model_call import place_of, words_of
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import only_parameters
from veneer.base_model.tied_embeddings import check_both, name_both, parted, tied_ends
from veneer.checkpoints.binding_plan import Binding, Plan, bind_error, make_plan
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.configs.base import AnyConfig, PeftConfig, PromptConfig, TargetedConfig, as_any_config, targeted
from veneer.configs.names import HEADS
from veneer.errors import NonFiniteError, TargetError
from veneer.files.tensor_keys import encode
from veneer.layers.adapter_shares import BoundAdapter
from veneer.methods import AnyMethod, method_of, prompt_of
from veneer.methods.base.abilities import (
    AdaptsTwins,
    ChangesWhenSaved,
    CompletesConfig,
    DerivesTensors,
    Exclusive,
    SharesBetweenLayers,
    SharesTensors,
    SureToChange,
    TiesEmbeddings,
    saved_tensors,
    settings_by_tensors,
)
from veneer.methods.base.leaf import Leaf
from veneer.methods.base.method import NewLayer
from veneer.methods.base.parts import parts_of
from veneer.methods.base.prompt_method import PromptEncoder
from veneer.printing import warn


@guarded
def load(
    adapters: Adapters,
    name: str,
    checkpoint: Checkpoint,
    *,
    trainable: bool,
    strict: bool = True,
    float32: bool = False,
) -> Adapter:
    """Add an adapter from its checkpoint. Either all of it is added or the model stays as it was.

    Raises:
        BindError: checkpoint and model do not fit (with ``strict=False`` what fits is used, with a warning).
        NonFiniteError: it holds NaN or infinite values.
        DuplicateAdapterError: the name is taken.
    """
    adapters.check_new(name)
    adapter = Adapter(name, as_any_config(checkpoint.config), checkpoint.origin, trainable=trainable)
    attaching = _attaching(adapters, adapter, float32)
    attaching.complete_config()
    plan = make_plan(adapter.config, method_of(adapter.config), checkpoint.tensors, adapters.catalog)
    _check_plan(adapters, plan, checkpoint, strict)
    tensors = checkpoint.read(plan.keys)
    attaching.check_tied(plan, tensors)
    sums = check_finite(tensors, checkpoint.origin)
    adapter.notes = [*checkpoint.notes, *plan.notes]
    adapter.tensors_bound = len(plan.keys)
    attaching.restore(plan, tensors)
    adapter.note_zero_layers(_sure_to_change(plan, sums))
    attaching.restore_whole_modules(plan, tensors)
    return attaching.registered()


@guarded
def create(
    adapters: Adapters,
    name: str,
    config: PeftConfig,
    *,
    generator: torch.Generator | None = None,
    float32: bool = True,
) -> Adapter:
    """Add a new, trainable adapter, with tensors in float32; or else in the dtype of a base in half precision.

    Raises:
        TargetError: the config's targets match nothing usable.
        DuplicateAdapterError: the name is taken.
    """
    adapters.check_new(name)
    config.check_supported()
    adapter = Adapter(name, as_any_config(config), trainable=True)
    attaching = _attaching(adapters, adapter, float32)
    attaching.complete_config()
    name_both(adapter.config, adapters.catalog)
    roots = adapters.catalog.saved(adapter.config)
    _check_saved_exist(adapters, adapter.config)
    attaching.create(roots, generator)
    adapter.note_zero_layers()
    for root in roots:
        attaching.place_copy(root, None, trainable=True)
    return attaching.registered()


class Attaching(ABC):
    """One adapter on its way onto a model.

    Args:
        adapters: of the model.
        adapter: without tensors yet.
        float32: whether its floating-point tensors are to be wider than they are.
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
        named = catalog.saved(adapter.config) if plan.whole_modules else []
        values = {root: {leaf: tensors[key] for leaf, key in keys.items()} for root, keys in plan.whole_modules.items()}
        for root in plan.whole_modules.keys() - named:
            # The base's own rows, so those of all that shares them.
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


class AttachingLayers(Attaching):
    """An adapter that has shares of layers."""

    @property
    def config(self) -> TargetedConfig:
        """The adapter's config."""
        return targeted(self.adapter.config)

    def complete_config(self) -> None:
        if self.config.experts:
            check_experts(self.config, self.adapters)

    def check_tied(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        if self.adapter.trainable:
            _check_trained_alike(self.adapters, self.config, plan, tensors)

    def restore(self, plan: Plan, tensors: dict[str, Tensor]) -> None:
        _restore_layers(self.adapters, self.adapter, plan, tensors, self.float32)

    def create(self, roots: list[str], generator: torch.Generator | None) -> None:
        _create_layers(self.adapters, self.adapter, self.config, roots, generator, self.float32)


class AttachingPrompt(Attaching):
    """An adapter that is a prompt."""

    def __init__(self, adapters: Adapters, adapter: Adapter, float32: bool, config: PromptConfig) -> None:
        super().__init__(adapters, adapter, float32)
        self.config, self.method = config, prompt_of(config)

    def complete_config(self) -> None:
        complete(self.config, self.method, self.adapters.model)

    def check_tied(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: it has no layers."""

    def restore(self, plan: Plan, tensors: dict[str, Tensor]) -> None:
        device, trainable = place_of(self.adapters.model), self.adapter.trainable
        own = {leaf: _parameter(tensors[key], device, self.float32, trainable) for leaf, key in plan.shared.items()}
        self._place(self.method.restored(self.config, own))

    def create(self, roots: list[str], generator: torch.Generator | None) -> None:
        self.adapters.check_places([], roots)
        words = words_of(self.adapters.model)
        encoder = self.method.new(self.config, words, generator)
        if self.adapters.is_spread:
            sharding.agree(encoder.state_dict().values())
        self._place(encoder.to(next(words.parameters()).device))

    def _place(self, encoder: PromptEncoder) -> None:
        prompts = self.adapters.prompts
        prompts.add(self.adapter.name, self.config, self.method, encoder, self.adapters.model)
        self.adapter.prompt = PromptPart(prompts)


def _attaching(adapters: Adapters, adapter: Adapter, float32: bool) -> Attaching:
    if isinstance(adapter.config, PromptConfig):
        return AttachingPrompt(adapters, adapter, float32, adapter.config)
    return AttachingLayers(adapters, adapter, float32)


def _restore_layers(
    adapters: Adapters, adapter: Adapter, plan: Plan, tensors: dict[str, Tensor], float32: bool
) -> None:
    config, trainable = targeted(adapter.config), adapter.trainable
    stored = {leaf: tensors[key] for leaf, key in plan.shared.items()}
    made = []
    for binding in plan.bindings:
        device = binding.site.device
        parameters = {
            leaf: _parameter(tensors[key], device, float32, trainable and binding.method.leaf(leaf).trained)
            for leaf, key in binding.keys.items()
        }
        parameters.update(_restored(adapters, binding, config))
        made.append(_PendingLayer(binding.site, binding.method, binding.settings, parameters, binding.twins))
    made = _tie_outputs(made, method_of(config), tied_ends(config, adapters.catalog), new=False, trainable=trainable)
    _bind(adapters, adapter, made, _shared(adapters, config, method_of(config), made, stored, float32, trainable, None))


def _restored(adapters: Adapters, binding: Binding, config: TargetedConfig) -> dict[str, nn.Parameter]:
    """The tensors of a layer that are in no checkpoint, and never trained."""
    site = binding.site
    if not isinstance(binding.method, ChangesWhenSaved):
        return {}
    tensors = binding.method.recomputed(config, binding.settings, lambda: adapters.base(site))
    return {name: _parameter(tensor, site.device, True, False) for name, tensor in tensors.items()}


def _create_layers(
    adapters: Adapters,
    adapter: Adapter,
    config: TargetedConfig,
    roots: list[str],
    generator: torch.Generator | None,
    float32: bool,
) -> None:
    method = method_of(config)
    if isinstance(method, CompletesConfig):
        method.complete(config, adapters.catalog)
    given = copy(config)
    held = name_experts(config, adapters.catalog, lambda site: _check_can_start(adapters, method, config, site))
    # The layers' names take the place of "all-linear" before anything else depends on them.
    if not only_parameters(config):
        adapters.catalog.spell_out(config, adapters.catalog.targets(config))
    parts = [part for part in parts_of(method, config, adapters.catalog) if not part.optional]
    warn_of_idle_names(given, adapters.catalog, held)
    adapters.check_spread([site for part in parts for site in part.sites], roots)
    adapters.check_places([site.name for part in parts for site in part.sites], roots)
    made = []
    for part in parts:
        for site in part.sites:
            part.method.check_site(site)
            settings = part.method.settings(config, site)
            tensors = part.method.init(NewLayer(config, settings, adapters.base(site), generator))
            parameters = {
                leaf: _parameter(t, site.device, True, part.method.leaf(leaf).trained) for leaf, t in tensors.items()
            }
            made.append(_PendingLayer(site, part.method, settings, parameters, part.twins.get(site.id, ())))
    shared = _shared(adapters, config, method, made, {}, True, True, generator)
    for one, more in _with_extra_tensors(adapters, config, method, made, shared):
        needed = one.method.shapes(one.settings, one.site).keys() - one.tensors.keys()
        one.tensors.update(
            (leaf.name, _parameter(more[leaf.name], one.site.device, True, leaf.trained))
            for leaf in one.method.leaves
            if leaf.name in needed & more.keys()
        )
    made = _tie_outputs(made, method, tied_ends(config, adapters.catalog), new=True, trainable=True)
    if adapters.is_spread:
        sharding.agree([*(t for one in made for t in one.tensors.values()), *shared.values()])
    if not float32:
        _in_dtype_of_base(made, shared.values())
    _bind(adapters, adapter, made, shared)


def _check_can_start(adapters: Adapters, method: AnyMethod, config: TargetedConfig, site: Site) -> None:
    """Raise where a new adapter of a config cannot be on a site."""
    sharding.check_site(site)
    method.check_site(site)
    settings = method.settings(config, site)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        method.init(NewLayer(config, settings, adapters.base(site), torch.Generator()))


def _in_dtype_of_base(made: Sequence[_PendingLayer], shared: Collection[nn.Parameter]) -> None:
    """Give new tensors the dtype of the layers that they are for, where that is a half-precision one."""
    for place, one in enumerate(made):
        dtype = one.site.stored.dtype
        if dtype in (torch.float16, torch.bfloat16):
            for parameter in (*one.tensors.values(), *(() if place else shared)):
                parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data


def _shared(
    adapters: Adapters,
    config: TargetedConfig,
    method: AnyMethod,
    made: Sequence[_PendingLayer],
    stored: dict[str, Tensor],
    float32: bool,
    trainable: bool,
    generator: torch.Generator | None,
) -> dict[str, nn.Parameter]:
    """The tensors that all layers use: from the checkpoint, else made from the config."""
    sites = [one.site for one in made if one.method is method]
    if not isinstance(method, SharesTensors) or not sites:
        return {}
    missing = method.shared_shapes(config, sites).keys() - stored.keys()
    fresh = method.make_shared(config, [adapters.base(site) for site in sites], generator) if missing else {}
    return {
        leaf: _parameter(tensor, sites[0].device, float32, trainable and method.trains_shared(config, leaf))
        for leaf, tensor in {**fresh, **stored}.items()
    }


def _with_extra_tensors(
    adapters: Adapters,
    config: TargetedConfig,
    method: AnyMethod,
    made: Sequence[_PendingLayer],
    shared: Mapping[str, nn.Parameter],
) -> list[tuple[_PendingLayer, Mapping[str, Tensor]]]:
    """Each layer of an adapter's own method, with what joins its tensors there."""
    own = [one for one in made if one.method is method]
    if not own or not isinstance(method, DerivesTensors):
        return [(layer, shared) for layer in own]
    return list(zip(own, method.extra_tensors(config, [adapters.base(one.site) for one in own], shared), strict=True))


def _bind(adapters: Adapters, adapter: Adapter, made: Sequence[_PendingLayer], shared: dict[str, nn.Parameter]) -> None:
    """Put tensors that are ready into their layers; from here on nothing can fail."""
    adapter.layers.shared = shared
    # The adapter's own method alone has such tensors; its companions (biases ...) have none.
    config = targeted(adapter.config)
    _share_between_layers(method_of(config), config, made)
    beside = {id(one): more for one, more in _with_extra_tensors(adapters, config, method_of(config), made, shared)}
    if shared:
        adapters.wrap(made[0].site).hold(adapter.name, shared)
    for one in made:
        layer = adapters.wrap(one.site)
        settings = settings_by_tensors(one.method, one.settings, one.tensors, layer)
        joining = _frozen(beside.get(id(one), {}), one.tensors, one.site)
        layer.hold(adapter.name, {k: t for k, t in joining.items() if not any(t is s for s in shared.values())})
        leaves = tuple(map(one.method.leaf, one.tensors))
        share = BoundAdapter(one.method, settings, leaves, one.site.key, joining)
        layer.bind(adapter.name, share, one.tensors)
        adapter.layers.by_id[one.site.id] = layer
        if isinstance(one.method, AdaptsTwins):
            _bind_twins(adapters, adapter, one.method, replace(one, settings=settings), leaves)
    adapter.layers.exclusive = any(isinstance(one.method, Exclusive) for one in made)


def _bind_twins(
    adapters: Adapters, adapter: Adapter, method: AdaptsTwins, made: _PendingLayer, leaves: tuple[Leaf, ...]
) -> None:
    """Let the layers that follow one that is bound use its tensors."""
    for twin in made.twins:
        settings = method.twin_settings(made.settings, twin)
        if settings is None:
            continue
        layer = adapter.layers.by_id[twin.id] = adapters.wrap(twin)
        key = twin.key if method.saves_twins else None
        layer.bind(adapter.name, BoundAdapter(made.method, settings, leaves, key), made.tensors)


def _check_plan(adapters: Adapters, plan: Plan, checkpoint: Checkpoint, strict: bool) -> None:
    if plan.problems:
        error = bind_error(
            plan, as_any_config(checkpoint.config), checkpoint.origin, len(checkpoint.tensors), adapters.catalog
        )
        if strict or not plan.keys:
            raise error
        warn(error.message + " What fits is used (strict=False).")
        plan.notes += plan.problems
    adapters.check_spread([b.site for b in plan.bindings], list(plan.whole_modules))
    adapters.check_places([b.site.name for b in plan.bindings], list(plan.whole_modules))


def _check_saved_exist(adapters: Adapters, config: AnyConfig) -> None:
    """A module that is to be saved whole must be there; of a task's usual heads one is enough."""
    usual = HEADS.get(str(config.task_type), ())
    for name in set(config.modules_to_save or ()) - set(usual):
        if not any(module.endswith(name) for module in adapters.catalog.modules):
            raise TargetError(
                f"modules_to_save names {name!r}, and the model has no such module.",
                hint=f"Its output layer is {' or '.join(adapters.catalog.outputs) or 'unknown'}.",
            )


def _join_saved(adapters: Adapters, adapter: Adapter) -> None:
    """Let two copies of layers that share a weight, and are to stay alike, share theirs where it is the same."""
    for pair in tied_ends(adapter.config, adapters.catalog):
        if set(pair) <= adapter.whole_modules.copies.keys():
            one, other = (adapter.whole_modules.copy_of(root, adapter)._parameters for root in pair)
            if _equal(one["weight"], other["weight"]):
                other["weight"] = one["weight"]


def _check_trained_alike(adapters: Adapters, config: AnyConfig, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Of two layers that are to stay alike both must be there, and be the same where they come whole."""
    pairs = tied_ends(config, adapters.catalog)
    adapted = [binding.site.name for binding in plan.bindings if binding.method is method_of(config)]
    check_both(pairs, [*adapted, *plan.whole_modules])
    for pair in pairs:
        if set(pair) <= plan.whole_modules.keys():
            one, other = (tensors[plan.whole_modules[root]["weight"]] for root in pair)
            if not _equal(one, other):
                raise parted(pair)


@dataclass(frozen=True)
class _PendingLayer:
    """A layer's share of an adapter that is about to be bound."""

    site: Site
    method: AnyMethod
    settings: Any
    tensors: dict[str, nn.Parameter]
    twins: Sequence[Site]


def _parameter(tensor: Tensor, device: torch.device, float32: bool, trainable: bool) -> nn.Parameter:
    dtype = torch.float32 if float32 and tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=trainable)


def _share_between_layers(method: AnyMethod, config: TargetedConfig, made: Sequence[_PendingLayer]) -> None:
    """Let layers use another's tensor where their method shares it."""
    if not isinstance(method, SharesBetweenLayers):
        return
    own = [one for one in made if one.method is method]
    for leaf, leaders in method.shared_between_layers(config, [one.site for one in own]).items():
        for one, leader in zip(own, leaders, strict=True):
            one.tensors[leaf] = own[leader].tensors[leaf]


def _tie_outputs(
    made: Sequence[_PendingLayer], method: AnyMethod, pairs: Sequence[tuple[str, str]], *, new: bool, trainable: bool
) -> list[_PendingLayer]:
    """Let output layers use the tensors of the embeddings that they are to stay like; loaded ones where they are equal.

    Raises:
        UnsupportedError: they are to be trained, and cannot be changed alike.
    """
    found = list(made)
    places = {one.site.name: place for place, one in enumerate(made) if one.method is method}
    for pair in pairs:
        if not places.keys() >= set(pair):
            continue
        embedding, output = (found[places[name]] for name in pair)
        settings = (
            method.tied_output_settings(embedding.settings, output.settings)
            if isinstance(method, TiesEmbeddings)
            else None
        )
        if settings is not None and (new or _same_as_embedding(output, settings, embedding.tensors)):
            found[places[pair[1]]] = replace(output, settings=settings, tensors=dict(embedding.tensors))
        elif trainable:
            raise parted(pair)
    return found


def _same_as_embedding(output: _PendingLayer, settings: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an output layer's tensors are what saving those of its embedding would give."""
    again = saved_tensors(output.method, settings, tensors)
    return again.keys() == output.tensors.keys() and all(_equal(again[k], t) for k, t in output.tensors.items())


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same; those of a model without memory, as a merge on disk has, tell nothing."""
    if one is None or other is None or one.is_meta or other.is_meta:
        return False
    return one.dtype == other.dtype and torch.equal(one, other)


def _frozen(more: Mapping[str, Tensor], own: Mapping[str, Tensor], site: Site) -> dict[str, nn.Parameter]:
    """What joins a layer's own tensors, as parameters; those that are parameters already are used as they are."""
    return {
        leaf: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.to(site.device), requires_grad=False)
        for leaf, tensor in more.items()
        if leaf not in own
    }


def _sure_to_change(plan: Plan, sums: Mapping[str, float]) -> set[str]:
    """The layers that change, as far as the sums of an adapter's tensors tell."""
    return {
        binding.site.id
        for binding in plan.bindings
        if isinstance(binding.method, SureToChange)
        and binding.method.nonzero_means_change(binding.settings)
        and all(sums.get(key) for key in binding.keys.values())
    }


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> dict[str, float]:
    """The sum of each floating-point tensor; ``NonFiniteError`` when one of the adapter ``origin`` is not finite."""
    # The sum of a tensor is read off many times faster than each value; it is finite where all of them are, but for
    # values so large that a second look costs nothing.
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return {}
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in floating.values()])
    if bool(torch.isfinite(sums).all()):
        return dict(zip(floating, sums.tolist(), strict=True))
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NonFiniteError(
            f"The adapter {origin} holds NaN or infinite values in {len(bad)} of {len(tensors)} tensors; the first "
            f"is {bad[0]}.",
            hint="Its training diverged or its file is damaged; take an earlier checkpoint.",
        )
    return {}
