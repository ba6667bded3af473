"""Adding an adapter to a model: from its checkpoint, or a new one from its config. All of it is added, or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.adapters.expert_names import name_experts, warn_of_idle_names
from veneer.adapters.experts import check_experts
from veneer.adapters.guard import guarded
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
    config = checkpoint.config
    method = adapters.method_for(config)
    _meet_experts(adapters, config)
    plan = make_plan(as_any_config(config), method, checkpoint.tensors, adapters.catalog)
    _check_plan(adapters, plan, checkpoint, strict)
    tensors = checkpoint.read(plan.keys)
    if trainable and not isinstance(config, PromptConfig):
        _check_trained_alike(adapters, as_any_config(config), plan, tensors)
    sums = check_finite(tensors, checkpoint.origin)
    notes = [*checkpoint.notes, *plan.notes]
    adapter = Adapter(name, as_any_config(config), checkpoint.origin, trainable=trainable, notes=notes)
    adapter.tensors_bound = len(plan.keys)
    stored = {leaf: tensors[key] for leaf, key in plan.shared.items()}
    if isinstance(config, PromptConfig):
        _restore_prompt(adapters, adapter, config, stored, float32, trainable)
    else:
        _restore_layers(adapters, adapter, plan, tensors, stored, float32, trainable)
        adapters.note_zero_layers(adapter, _sure_to_change(plan, sums))
    meant = adapters.catalog.saved(as_any_config(config)) if plan.saved else []
    saved = {root: {leaf: tensors[key] for leaf, key in keys.items()} for root, keys in plan.saved.items()}
    for root in plan.saved.keys() - meant:
        # The base's own rows, so those of all that shares them.
        sharing = [site.name for site in adapters.catalog.sharing(root) if site.id not in adapter.layers]
        saved.update({name: {"weight": saved[root]["weight"]} for name in sharing if name not in saved})
    adapter.vocabulary_rows = saved.keys() - meant
    for root, values in saved.items():
        trained = trainable and root in meant
        adapters.place_copies(root).add(name, values).requires_grad_(trained)
        adapter.whole_modules.append(root)
        if not trained:
            adapter.saved_dtypes.update(
                {encode(root, leaf, method.prefix): tensor.dtype for leaf, tensor in values.items()}
            )
    _join_saved(adapters, adapter)
    adapters.register(adapter)
    return adapter


def _meet_experts(adapters: Adapters, config: PeftConfig) -> None:
    if isinstance(config, TargetedConfig) and config.experts:
        check_experts(config, adapters)


def _restore_layers(
    adapters: Adapters,
    adapter: Adapter,
    plan: Plan,
    tensors: dict[str, Tensor],
    stored: dict[str, Tensor],
    float32: bool,
    trainable: bool,
) -> None:
    config = targeted(adapter.config)
    made = []
    for binding in plan.bindings:
        device = binding.site.device
        parameters = {
            leaf: _parameter(tensors[key], device, float32, trainable and binding.method.trains(leaf))
            for leaf, key in binding.keys.items()
        }
        parameters.update(_restored(adapters, binding, config))
        made.append(_PendingLayer(binding.site, binding.method, binding.settings, parameters, binding.twins))
    made = _tie_outputs(made, method_of(config), tied_ends(config, adapters.catalog), new=False, trainable=trainable)
    _bind(adapters, adapter, made, _shared(adapters, config, method_of(config), made, stored, float32, trainable, None))


def _restore_prompt(
    adapters: Adapters,
    adapter: Adapter,
    config: PromptConfig,
    stored: dict[str, Tensor],
    float32: bool,
    trainable: bool,
) -> None:
    device = place_of(adapters.model)
    own = {leaf: _parameter(tensor, device, float32, trainable) for leaf, tensor in stored.items()}
    _add_prompt(adapters, adapter, config, prompt_of(config).restored(config, own))


def _add_prompt(adapters: Adapters, adapter: Adapter, config: PromptConfig, encoder: PromptEncoder) -> None:
    adapters.prompts.add(adapter.name, config, prompt_of(config), encoder, adapters.model)
    adapter.virtual_tokens = config.num_virtual_tokens or 0


def _restored(adapters: Adapters, binding: Binding, config: TargetedConfig) -> dict[str, nn.Parameter]:
    """The tensors of a layer that are in no checkpoint, and never trained."""
    site = binding.site
    found = binding.method.restored(config, binding.settings, lambda: adapters.base(site))
    return {leaf: _parameter(tensor, site.device, True, False) for leaf, tensor in found.items()}


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
    config.check_honoured()
    _meet_experts(adapters, config)
    adapter = Adapter(name, as_any_config(config), trainable=True)
    name_both(adapter.config, adapters.catalog)
    roots = adapters.catalog.saved(adapter.config)
    _check_saved_exist(adapters, adapter.config)
    if isinstance(config, PromptConfig):
        adapters.method_for(config)
        adapters.check_places([], roots)
        words = words_of(adapters.model)
        encoder = prompt_of(config).new(config, words, generator)
        if adapters.is_spread:
            sharding.agree(encoder.state_dict().values())
        _add_prompt(adapters, adapter, config, encoder.to(next(words.parameters()).device))
    else:
        _create_layers(adapters, adapter, targeted(config), roots, generator, float32)
    for root in roots:
        adapters.place_copies(root).add(name).requires_grad_(True)
        adapter.whole_modules.append(root)
    _join_saved(adapters, adapter)
    adapters.register(adapter)
    return adapter


def _create_layers(
    adapters: Adapters,
    adapter: Adapter,
    config: TargetedConfig,
    roots: list[str],
    generator: torch.Generator | None,
    float32: bool,
) -> None:
    method = method_of(config)
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
                leaf: _parameter(t, site.device, True, part.method.trains(leaf)) for leaf, t in tensors.items()
            }
            made.append(_PendingLayer(site, part.method, settings, parameters, part.twins.get(site.id, ())))
    shared = _shared(adapters, config, method, made, {}, True, True, generator)
    for one, more in _with_extra_tensors(adapters, config, method, made, shared):
        needed = one.method.shapes(one.settings, one.site).keys() - one.tensors.keys() - one.method.optional
        one.tensors.update(
            (leaf, _parameter(more[leaf], one.site.device, True, one.method.trains(leaf)))
            for leaf in one.method.leaves
            if leaf in needed & more.keys()
        )
    made = _tie_outputs(made, method, tied_ends(config, adapters.catalog), new=True, trainable=True)
    if adapters.is_spread:
        sharding.agree([*(t for one in made for t in one.tensors.values()), *shared.values()])
    if not float32:
        _in_dtype_of_base(made, shared.values())
    _bind(adapters, adapter, made, shared)
    adapters.note_zero_layers(adapter)


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
    if not method.shared or not sites:
        return {}
    missing = method.shared_shapes(config, sites).keys() - stored.keys()
    fresh = method.make_shared(config, [adapters.base(site) for site in sites], generator) if missing else {}
    return {
        leaf: _parameter(tensor, sites[0].device, float32, trainable and method.trains_shared_leaf(config, leaf))
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
    if not own:
        return []
    return list(zip(own, method.beside(config, [adapters.base(one.site) for one in own], shared), strict=True))


def _bind(adapters: Adapters, adapter: Adapter, made: Sequence[_PendingLayer], shared: dict[str, nn.Parameter]) -> None:
    """Put tensors that are ready into their layers; from here on nothing can fail."""
    adapter.shared = shared
    # The adapter's own method alone has such tensors; its companions (biases ...) have none.
    config = targeted(adapter.config)
    _share_between_layers(method_of(config), config, made)
    beside = {id(one): more for one, more in _with_extra_tensors(adapters, config, method_of(config), made, shared)}
    if shared:
        adapters.wrap(made[0].site).hold(adapter.name, shared)
    for one in made:
        layer = adapters.wrap(one.site)
        settings = one.method.settled(one.settings, one.tensors, layer)
        joining = _frozen(beside.get(id(one), {}), one.tensors, one.site)
        layer.hold(adapter.name, {k: t for k, t in joining.items() if not any(t is s for s in shared.values())})
        share = BoundAdapter(one.method, settings, tuple(one.tensors), one.site.key, joining)
        layer.bind(adapter.name, share, one.tensors)
        adapter.layers.append(one.site.id)
        for twin, twinned in ((twin, one.method.twinned(settings, twin)) for twin in one.twins):
            if twinned is not None:
                key = twin.key if one.method.saves_twins else None
                adapters.wrap(twin).bind(
                    adapter.name, BoundAdapter(one.method, twinned, tuple(one.tensors), key), one.tensors
                )
                adapter.layers.append(twin.id)
    adapter.layers = list(dict.fromkeys(adapter.layers))
    adapter.exclusive = any(one.method.alone for one in made)


def _check_plan(adapters: Adapters, plan: Plan, checkpoint: Checkpoint, strict: bool) -> None:
    if plan.problems:
        error = bind_error(
            plan, as_any_config(checkpoint.config), checkpoint.origin, len(checkpoint.tensors), adapters.catalog
        )
        if strict or not plan.keys:
            raise error
        warn(error.message + " What fits is used (strict=False).")
        plan.notes += plan.problems
    adapters.check_spread([b.site for b in plan.bindings], list(plan.saved))
    adapters.check_places([b.site.name for b in plan.bindings], list(plan.saved))


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
        if set(pair) <= set(adapter.whole_modules):
            one, other = (adapters.copy_of(root, adapter.name)._parameters for root in pair)
            if _equal(one["weight"], other["weight"]):
                other["weight"] = one["weight"]


def _check_trained_alike(adapters: Adapters, config: AnyConfig, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Of two layers that are to stay alike both must be there, and be the same where they come whole."""
    pairs = tied_ends(config, adapters.catalog)
    adapted = [binding.site.name for binding in plan.bindings if binding.method is method_of(config)]
    check_both(pairs, [*adapted, *plan.saved])
    for pair in pairs:
        if set(pair) <= plan.saved.keys():
            one, other = (tensors[plan.saved[root]["weight"]] for root in pair)
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
    own = [one for one in made if one.method is method]
    for leaf, leaders in method.tied(config, [one.site for one in own]).items():
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
        settings = method.joined(embedding.settings, output.settings)
        if settings is not None and (new or _same_as_embedding(output, settings, embedding.tensors)):
            found[places[pair[1]]] = replace(output, settings=settings, tensors=dict(embedding.tensors))
        elif trainable:
            raise parted(pair)
    return found


def _same_as_embedding(output: _PendingLayer, settings: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an output layer's tensors are what saving those of its embedding would give."""
    again = output.method.on_disk(settings, tensors)
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
        if binding.method.changes_unless_zero(binding.settings) and all(sums.get(k) for k in binding.keys.values())
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
