"""Checkpoint + model -> what goes where.

Each key of the checkpoint's header decodes to a slot, each slot is looked up in the model's catalog, and every
problem is collected before one error is raised. No tensor is read and the model is not touched. A plan is kept for
the next adapter with the same config and keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites import kinds
from veneer.base_model.sites.quantized.packed import refusal
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import is_inside, names_match
from veneer.configs.base import AnyConfig
from veneer.errors import BindError, TargetError
from veneer.files.tensor_keys import SHARED_PREFIX, Slot, decode
from veneer.methods import AnyMethod, Method
from veneer.methods.base.leaf import Leaf
from veneer.methods.base.method import MethodOnSites, leaves_of
from veneer.methods.base.parts import parts_of

# How many problems an error's text spells out; the error object holds them all.
MAX_PROBLEMS_SHOWN = 4

# peft writes these beside the others when it saves embeddings of its own accord: a module's copy under its name in
# memory, and the base's module under it.
_SPARE = (".modules_to_save.", ".original_module.")


class HasShape(Protocol):
    """What the plan needs of a tensor: a header's entry has it, and so has the tensor itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


class PlannedMethod(Protocol):
    """What the plan needs of a method, whether it adapts layers or is a prompt."""

    @property
    def shared(self) -> tuple[Leaf, ...]: ...
    @property
    def prefix(self) -> str: ...
    def parts(self, config: Any, catalog: Catalog) -> list[MethodOnSites]: ...
    def shared_shapes(self, config: Any, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]: ...
    def saves_shared(self, config: Any) -> bool: ...


@dataclass(frozen=True)
class Binding:
    """One layer's share of an adapter.

    Attributes:
        site: the layer.
        method: lowers its tensors.
        settings: the config's meaning here.
        keys: leaf -> the checkpoint's key.
        twins: other layers that use the same tensors.
    """

    site: Site
    method: AnyMethod
    settings: Any
    keys: Mapping[str, str]
    twins: Sequence[Site] = ()


@dataclass
class Plan:
    """What goes where, and what does not fit.

    Attributes:
        bindings: the adapted layers.
        saved: module that comes whole -> its parameter -> the checkpoint's key.
        shared: tensor that all layers use -> the checkpoint's key.
        again: the keys of tensors that another layer has too.
        problems: each reason why it does not fit, a line apiece.
        notes: what is odd and harmless.
    """

    bindings: list[Binding] = field(default_factory=list)
    saved: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Every key that binds."""
        bound = [k for b in self.bindings for k in b.keys.values()]
        return bound + self.again + [k for p in (self.shared, *self.saved.values()) for k in p.values()]


def make_plan(config: AnyConfig, method: PlannedMethod, tensors: Mapping[str, HasShape], catalog: Catalog) -> Plan:
    """Pair a checkpoint's tensors with a model's modules."""
    key = method, repr(config), tuple((name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items())
    kept: _CachedPlan | None = catalog.plans.get(key)
    if kept is None or not kept.is_current(catalog):
        plan = _made_plan(config, method, tensors, catalog)
        if plan.problems or plan.saved or any(binding.settings is config for binding in plan.bindings):
            return plan
        kept = catalog.plans[key] = _CachedPlan(plan, _states(plan, catalog))
    return replace(kept.plan, again=list(kept.plan.again), notes=list(kept.plan.notes))


@dataclass(frozen=True)
class _CachedPlan:
    """A plan, and how the layers were when it was made."""

    plan: Plan
    states: list[Any]

    def is_current(self, catalog: Catalog) -> bool:
        return self.states == _states(self.plan, catalog)


def _states(plan: Plan, catalog: Catalog) -> list[Any]:
    """What of the layers a plan depends on: which they are, and their parameters' kinds and shapes."""
    return [
        (id(module), *[None if p is None else (type(p), p.dtype, p.shape) for p in module._parameters.values()])
        for module in [catalog.modules[binding.site.name] for binding in plan.bindings]
    ]


def _made_plan(config: AnyConfig, method: PlannedMethod, tensors: Mapping[str, HasShape], catalog: Catalog) -> Plan:
    plan = Plan()
    parts = _parts(plan, config, method, catalog)
    leaves = leaves_of(parts)
    ignored = [leaf.name for leaf in getattr(method, "leaves", ()) if not leaf.loaded]
    shared = {leaf.name for leaf in method.shared}
    saved = _saved(plan, config, [*leaves, *ignored], method.prefix, tensors, catalog)
    held: dict[tuple[str, str], dict[str, str]] = {}
    spare: list[str] = []
    empty: list[str] = []
    for key in tensors:
        slot = decode(key, [*leaves, *ignored], method.prefix)
        common = key.removeprefix(SHARED_PREFIX)
        if common.partition(".")[0] in shared:
            plan.shared[common] = key
        elif slot is None:
            plan.problems.append(f"{key}: not in the PEFT dialect (it would begin with {method.prefix})")
        elif slot.leaf in ignored:
            empty.append(key)
        elif any(infix in key for infix in _SPARE):
            spare.append(key)
        elif slot.leaf in leaves and not is_inside(slot.module, saved):
            held.setdefault((slot.module, next(iter(leaves[slot.leaf].method.disk_names))), {})[slot.leaf] = key
        else:
            _plan_saved(plan, key, slot, tensors[key], saved, catalog)
    if empty:
        plan.notes.append(f"{len(empty)} tensors that say nothing are left out (first: {min(empty)}).")
    if spare:
        plan.notes.append(f"{len(spare)} tensors repeat others or the base (first: {min(spare)}); they are not needed.")
    for part in parts:
        _plan_part(plan, part, held, config, tensors, catalog)
    _check_shared(plan, config, method, tensors)
    _check_saved_filled(plan, saved, catalog)
    return plan


def _saved(
    plan: Plan, config: AnyConfig, leaves: Sequence[str], prefix: str, tensors: Iterable[str], catalog: Catalog
) -> list[str]:
    """The modules that are to come whole. One that an entry only happens to end like may be absent, as older files are.

    "classifier" means "pre_classifier" too, which was not always saved with it.
    """
    saved = catalog.saved(config)
    exact = [root for root in saved if names_match(root, config.modules_to_save)]
    if len(exact) == len(saved):
        return saved
    slots = [slot for key in tensors if (slot := decode(key, leaves, prefix)) is not None and slot.leaf not in leaves]
    held = [root for root in saved if root in exact or any(is_inside(slot.module, [root]) for slot in slots)]
    absent = [root for root in saved if root not in held]
    if absent:
        plan.notes.append(
            f"modules_to_save={config.modules_to_save!r} means {absent[0]} too, and the checkpoint does not hold it: "
            "the base's is used."
        )
    return held


def _parts(plan: Plan, config: AnyConfig, method: PlannedMethod, catalog: Catalog) -> list[MethodOnSites]:
    """The layers that the config means; those that the checkpoint holds are used even where that cannot be told."""
    try:
        return parts_of(method, config, catalog)
    except TargetError as error:
        plan.notes.append(f"The config's targets could not be checked: {error.message}")
        assert isinstance(method, Method)
        return [MethodOnSites(method.for_config(config), [], optional=True)]


def _plan_part(
    plan: Plan,
    part: MethodOnSites,
    held: Mapping[tuple[str, str], Mapping[str, str]],
    config: AnyConfig,
    tensors: Mapping[str, HasShape],
    catalog: Catalog,
) -> None:
    meant = {site.key: site for site in part.sites}
    own = {module: keys for (module, head), keys in held.items() if head == next(iter(part.method.disk_names), "")}
    if part.method.twins_repeat:
        for twin in (twin for twins in part.twins.values() for twin in twins):
            for leaf, key in own.pop(twin.key, {}).items():
                plan.again.append(key)
                first = next((keys[leaf] for keys in own.values() if leaf in keys), key)
                if tuple(tensors[key].shape) != tuple(tensors[first].shape):
                    plan.problems.append(f"{key}: is {tuple(tensors[key].shape)}, and {first} is not")
    else:
        meant |= {twin.key: twin for twins in part.twins.values() for twin in twins if twin.key in own}
    extra = []
    for module in [name for name in own if name not in meant]:
        extra += _plan_extra(plan, module, part.method, own[module], config, tensors, catalog)
    for key, site in meant.items():
        # A layer may have no tensors of its own: its method then keeps them all in common.
        if key in own or not (part.optional or part.method.shapes(part.method.settings(config, site), site)):
            twins = [t for t in part.twins.get(site.id, ()) if t.key not in own and t.name not in plan.saved]
            _plan_site(plan, site, part.method, own.get(key, {}), config, tensors, twins)
        elif not part.optional:
            plan.problems.append(f"{key}: the config targets it, and the checkpoint holds nothing for it")
    if extra and not part.optional:
        plan.notes.append(
            f"{len(extra)} adapted layers are not among the config's targets (first: {min(extra)}); they are used."
        )


def _plan_extra(
    plan: Plan,
    module: str,
    method: AnyMethod,
    keys: Mapping[str, str],
    config: AnyConfig,
    tensors: Mapping[str, HasShape],
    catalog: Catalog,
) -> list[str]:
    """Plan a layer that the checkpoint holds and the config does not mean."""
    if module not in catalog.modules:
        plan.problems.append(f"{next(iter(keys.values()))}: the model has no {module}{_nearest(module, catalog)}")
        return []
    sites = [site for site in catalog.sites_at(module) if site.key == module]
    if not sites:
        kind = type(catalog.modules[module]).__name__
        why = refusal(catalog.modules[module]) or f"kinds that can: {kinds()}"
        plan.problems.append(f"{module} ({kind}) cannot carry an adapter; {why}")
        return []
    _plan_site(plan, sites[0], method, keys, config, tensors)
    return [module]


def _plan_site(
    plan: Plan,
    site: Site,
    method: AnyMethod,
    keys: Mapping[str, str],
    config: AnyConfig,
    tensors: Mapping[str, HasShape],
    twins: Sequence[Site] = (),
) -> None:
    method.check_site(site)
    settings = _settings(method, config, site, {leaf: tensors[key].shape for leaf, key in keys.items()})
    wanted = method.shapes(settings, site)
    problems = [
        f"{site.key}: {leaf} is in the checkpoint, and this layer and config have no such tensor"
        for leaf in keys
        if leaf not in wanted
    ]
    for leaf, shape in wanted.items():
        if leaf not in keys:
            problems.append(f"{site.key}: {leaf} is missing from the checkpoint")
        elif tuple(tensors[keys[leaf]].shape) != shape:
            stored = tuple(tensors[keys[leaf]].shape)
            problems.append(f"{site.key}: {leaf} is {stored}, and this layer and config want {shape}")
        else:
            problems += _of_wrong_kind(f"{site.key}: {leaf}", tensors[keys[leaf]], not method.leaf(leaf).integer)
    plan.problems += problems
    if not problems:
        plan.bindings.append(Binding(site, method, settings, dict(keys), twins))


def _settings(method: AnyMethod, config: AnyConfig, site: Site, stored: Mapping[str, tuple[int, ...]]) -> Any:
    """What the config means for a layer, or the first of the method's other readings of it that has these shapes."""
    shapes = {leaf: tuple(shape) for leaf, shape in stored.items()}
    first = method.fitted(method.settings(config, site), shapes, site)
    for settings in (first, *method.readings(first, config)):
        if shapes == method.shapes(settings, site):
            return settings
    return first


def _plan_saved(plan: Plan, key: str, slot: Slot, tensor: HasShape, saved: list[str], catalog: Catalog) -> None:
    roots = [*saved, *(name for name in (*catalog.inputs, *catalog.outputs) if name not in saved)]
    root = next((name for name in roots if is_inside(slot.module, [name])), None)
    if root is None:
        where = (
            ""
            if slot.module in catalog.modules
            else f"; the model has no {slot.module}{_nearest(slot.module, catalog)}"
        )
        plan.problems.append(f"{key}: neither a tensor of this method nor in modules_to_save{where}")
        return
    name = f"{slot.module}.{slot.leaf}"[len(root) + 1 :]
    have = catalog.modules[root].state_dict(keep_vars=True).get(name)
    if have is None:
        plan.problems.append(f"{key}: {root} has no parameter {name}")
    elif tuple(have.shape) != tuple(tensor.shape):
        rows = tensor.shape[0] if catalog.is_end(root) else 0
        mend = f" (resize the base first: resize_token_embeddings({rows}))" if rows else ""
        plan.problems.append(f"{key}: is {tuple(tensor.shape)}, and the model's is {tuple(have.shape)}{mend}")
    elif problems := _of_wrong_kind(key, tensor, _is_floating(have)):
        plan.problems += problems
    else:
        plan.saved.setdefault(root, {})[name] = key


def _of_wrong_kind(what: str, tensor: HasShape, floating: bool) -> list[str]:
    """Whole numbers where weights belong, or the other way round, are a problem: what was meant cannot be told."""
    if _is_floating(tensor) == floating:
        return []
    wanted = "floating-point numbers" if floating else "whole numbers"
    return [f"{what} is of dtype {str(tensor.dtype).removeprefix('torch.')}, and {wanted} belong there"]


def _is_floating(tensor: HasShape) -> bool:
    """By the dtype's name, in a header or in torch."""
    return str(tensor.dtype).removeprefix("torch.").lower().startswith(("f", "bf"))


def _check_shared(plan: Plan, config: AnyConfig, method: PlannedMethod, tensors: Mapping[str, HasShape]) -> None:
    sites = [binding.site for binding in plan.bindings if binding.method is method]
    wanted = method.shared_shapes(config, sites)
    integers = {leaf.name for leaf in method.shared if leaf.integer}
    plan.problems += [
        f"{leaf}: in the checkpoint, and this model and config have no such tensor"
        for leaf in plan.shared
        if leaf not in wanted
    ]
    for leaf, shape in wanted.items():
        if leaf in plan.shared:
            stored = tuple(tensors[plan.shared[leaf]].shape)
            if stored != shape:
                plan.problems.append(f"{leaf}: is {stored}, and this model and config want {shape}")
            wide = leaf.partition(".")[0] not in integers
            plan.problems += _of_wrong_kind(leaf, tensors[plan.shared[leaf]], wide)
        elif method.saves_shared(config):
            plan.problems.append(f"{leaf}, which all layers share, is missing from the checkpoint")


def _check_saved_filled(plan: Plan, saved: list[str], catalog: Catalog) -> None:
    for root in saved:
        missing = catalog.modules[root].state_dict(keep_vars=True).keys() - plan.saved.get(root, {}).keys()
        plan.problems += [
            f"{root}.{name}: the config saves {root} whole, and the checkpoint does not fill it"
            for name in sorted(missing)
        ]


def _nearest(module: str, catalog: Catalog) -> str:
    ending = module.rpartition(".")[2]
    alike = [name for name in catalog.modules if name.rpartition(".")[2] == ending]
    carriers = [name for name, linear in catalog.linear.items() if linear]
    near = difflib.get_close_matches(module, alike or carriers, n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def bind_error(plan: Plan, config: AnyConfig, origin: str, total: int, catalog: Catalog) -> BindError:
    """The one error for all of a plan's problems."""
    bound = len(plan.keys)
    shown = "; ".join(plan.problems[:MAX_PROBLEMS_SHOWN])
    more = f"; and {len(plan.problems) - MAX_PROBLEMS_SHOWN} more" if len(plan.problems) > MAX_PROBLEMS_SHOWN else ""
    return BindError(
        f"The adapter {origin} does not fit {catalog.describe()}: {bound} of {total} tensors bind. {shown}{more}.",
        problems=plan.problems,
        hint=f"It names {config.base_model_name_or_path or 'no model'} as its base; load it on that one, or pass "
        "strict=False to use only what fits.",
    )
