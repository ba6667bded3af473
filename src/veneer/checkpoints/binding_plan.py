"""The plan of a checkpoint on a model: each tensor meets its layer.

Each key of the checkpoint's header decodes to a slot, each slot is looked up in the model's catalog, and every
problem is collected before one error is raised. No tensor is read and the model is not touched. A plan is kept for
the next adapter with the same config and keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from veneer.base_model.catalog import Catalog
from veneer.base_model.sites import kinds, refusal
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import is_inside, names_match
from veneer.configs.base import AnyConfig
from veneer.errors import BindError, TargetError
from veneer.files.tensor_keys import SHARED_PREFIX, Slot, decode
from veneer.methods import AnyMethod, Method
from veneer.methods.base.abilities import AdaptsTwins, SettledByCheckpoint, StoresShared, shared_names, specialised
from veneer.methods.base.method import MethodOnSites, leaves_of
from veneer.methods.base.parts import parts_of
from veneer.methods.base.prompt_method import AnyPrompt

# The number of problems that an error's text spells out; the error object holds them all.
MAX_PROBLEMS_SHOWN = 4

# Parts of keys that peft writes beside the others when it saves embeddings of its own accord: of a module's copy under
# its name in memory, and of the base's module under it.
_SPARE = (".modules_to_save.", ".original_module.")


class HasShape(Protocol):
    """Has what the plan needs of a tensor: a header's entry, or the tensor itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class Binding:
    """Holds one layer's share of an adapter.

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
    """Holds which tensor goes where, and what does not fit.

    Attributes:
        bindings: the adapted layers.
        whole_modules: module that comes whole -> its parameter -> the checkpoint's key.
        shared: tensor that all layers use -> the checkpoint's key.
        repeated_keys: the keys of tensors that another layer has too.
        problems: each reason why it does not fit, a line apiece.
        notes: oddities that do no harm.
    """

    bindings: list[Binding] = field(default_factory=list)
    whole_modules: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    repeated_keys: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Every key that binds."""
        bound = [k for b in self.bindings for k in b.keys.values()]
        return bound + self.repeated_keys + [k for p in (self.shared, *self.whole_modules.values()) for k in p.values()]


def make_plan(
    config: AnyConfig, method: AnyMethod | AnyPrompt, tensors: Mapping[str, HasShape], catalog: Catalog
) -> Plan:
    """Pair a checkpoint's tensors with a model's modules."""
    # Kept for adapters that are alike: about 8 ms less for each: benchmarks/notes.md, Attach.
    key = method, repr(config), tuple((name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items())
    plans = PLANS.setdefault(catalog, {})
    cached = plans.get(key)
    if cached is None or not cached.is_current(catalog):
        plan = _Planner(config, method, tensors, catalog).make()
        if plan.problems or plan.whole_modules or any(binding.settings is config for binding in plan.bindings):
            return plan
        cached = plans[key] = _CachedPlan(plan, _states(plan, catalog))
    return replace(cached.plan, repeated_keys=list(cached.plan.repeated_keys), notes=list(cached.plan.notes))


@dataclass(frozen=True)
class _CachedPlan:
    """Holds a plan, and the state that the layers had when it was made."""

    plan: Plan
    states: list[Any]

    def is_current(self, catalog: Catalog) -> bool:
        """Tell whether the layers are still so."""
        return self.states == _states(self.plan, catalog)


# Each model's plans, as long as its catalog lives.
PLANS: WeakKeyDictionary[Catalog, dict[Any, _CachedPlan]] = WeakKeyDictionary()


def _states(plan: Plan, catalog: Catalog) -> list[Any]:
    """Return what a plan depends on of its layers: which they are, and their parameters' kinds and shapes."""
    return [
        (id(module), *[None if p is None else (type(p), p.dtype, p.shape) for p in module._parameters.values()])
        for module in [catalog.modules[binding.site.name] for binding in plan.bindings]
    ]


class _Planner:
    """Makes the plan of one checkpoint on one model.

    Args:
        config: the adapter's.
        method: that of the config.
        tensors: the checkpoint's, by key.
        catalog: the model's modules.
    """

    def __init__(
        self, config: AnyConfig, method: AnyMethod | AnyPrompt, tensors: Mapping[str, HasShape], catalog: Catalog
    ) -> None:
        self.config, self.method, self.tensors, self.catalog = config, method, tensors, catalog
        self.plan = Plan()
        self._parts = self._find_parts()
        self._by_leaf = leaves_of(self._parts)
        self._ignored = [leaf.name for leaf in method.leaves if not leaf.loaded] if isinstance(method, Method) else []
        self._names = [*self._by_leaf, *self._ignored]
        # Whole modules that the checkpoint is to hold.
        self._whole = self._whole_modules()
        # (module, first leaf of a method) -> leaf -> key
        self._keys: dict[tuple[str, str], dict[str, str]] = {}

    def make(self) -> Plan:
        """Give each key its place, and check that every layer, shared tensor and whole module has what it needs."""
        self._sort_keys()
        for part in self._parts:
            self._plan_part(part)
        self._check_shared()
        self._check_whole_modules_filled()
        return self.plan

    def _problem(self, text: str) -> None:
        self.plan.problems.append(text)

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def _find_parts(self) -> list[MethodOnSites]:
        """Return the layers that the config means; where it cannot tell, those in the checkpoint are to count."""
        try:
            return parts_of(self.method, self.config, self.catalog)
        except TargetError as error:
            self.plan.notes.append(f"The config's targets could not be checked: {error.message}")
            assert isinstance(self.method, Method)
            return [MethodOnSites(specialised(self.method, self.config), [], optional=True)]

    # -- sorting the keys ----------------------------------------------------------------------------------

    def _slot(self, key: str) -> Slot | None:
        return decode(key, self._names, self.method.prefix)

    def _whole_modules(self) -> list[str]:
        """Return the modules that are to come whole.

        One that an entry only happens to end like may be absent, as in older files: "classifier" means
        "pre_classifier" too, which was not always saved with it.
        """
        named = self.catalog.whole_modules(self.config)
        exact = [root for root in named if names_match(root, self.config.modules_to_save)]
        if len(exact) == len(named):
            return named
        slots = [slot for key in self.tensors if (slot := self._slot(key)) is not None]
        modules = [slot.module for slot in slots if slot.leaf not in self._names]
        held = [root for root in named if root in exact or any(is_inside(module, [root]) for module in modules)]
        absent = [root for root in named if root not in held]
        if absent:
            self.plan.notes.append(
                f"modules_to_save={self.config.modules_to_save!r} means {absent[0]} too, and the checkpoint does not "
                "hold it: the base's is used."
            )
        return held

    def _sort_keys(self) -> None:
        """Tell each key's place: shared, of a layer, of a whole module, or of no use."""
        shared = shared_names(self.method)
        ignored: list[str] = []
        repeated: list[str] = []
        for key in self.tensors:
            slot = self._slot(key)
            name = key.removeprefix(SHARED_PREFIX)
            if name.partition(".")[0] in shared:
                self.plan.shared[name] = key
            elif slot is None:
                self._problem(f"{key}: not in the PEFT dialect (it would begin with {self.method.prefix})")
            elif slot.leaf in self._ignored:
                ignored.append(key)
            elif any(infix in key for infix in _SPARE):
                repeated.append(key)
            elif slot.leaf in self._by_leaf and not is_inside(slot.module, self._whole):
                head = next(iter(self._by_leaf[slot.leaf].method.disk_names))
                self._keys.setdefault((slot.module, head), {})[slot.leaf] = key
            else:
                self._plan_whole_module(key, slot)
        if ignored:
            self.plan.notes.append(f"{len(ignored)} tensors that say nothing are left out (first: {min(ignored)}).")
        if repeated:
            self.plan.notes.append(
                f"{len(repeated)} tensors repeat others or the base (first: {min(repeated)}); they are not needed."
            )

    # -- layers --------------------------------------------------------------------------------------------

    def _plan_part(self, part: MethodOnSites) -> None:
        head = next(iter(part.method.disk_names), "")
        keys_of = {module: keys for (module, first), keys in self._keys.items() if first == head}
        sites = {site.key: site for site in part.sites}
        if isinstance(part.method, AdaptsTwins) and part.method.twins_repeat:
            self._set_twins_aside(part, keys_of)
        else:
            sites |= {twin.key: twin for twins in part.twins.values() for twin in twins if twin.key in keys_of}
        extra = [name for name in keys_of if name not in sites and self._plan_extra(name, part.method, keys_of[name])]
        for key, site in sites.items():
            # A layer may have no tensors of its own: its method then keeps them all in common.
            if key in keys_of or not (part.optional or self._has_tensors(part.method, site)):
                twins = [twin for twin in part.twins.get(site.id, ()) if twin.key not in keys_of]
                twins = [twin for twin in twins if twin.name not in self.plan.whole_modules]
                self._plan_site(site, part.method, keys_of.get(key, {}), twins)
            elif not part.optional:
                self._problem(f"{key}: the config targets it, and the checkpoint holds nothing for it")
        if extra and not part.optional:
            self.plan.notes.append(
                f"{len(extra)} adapted layers are not among the config's targets (first: {min(extra)}); they are used."
            )

    def _has_tensors(self, method: AnyMethod, site: Site) -> bool:
        return bool(method.shapes(method.settings(self.config, site), site))

    def _set_twins_aside(self, part: MethodOnSites, keys_of: dict[str, dict[str, str]]) -> None:
        """Take the tensors of twins out of ``keys_of``: they are those of the layers that the twins follow."""
        firsts = {site.id: keys_of.get(site.key, {}) for site in part.sites}
        for site_id, twin in ((site_id, twin) for site_id, twins in part.twins.items() for twin in twins):
            for leaf, key in keys_of.pop(twin.key, {}).items():
                self.plan.repeated_keys.append(key)
                first = firsts.get(site_id, {}).get(leaf, key)
                if self._shape(key) != self._shape(first):
                    self._problem(f"{key}: is {self._shape(key)}, and {first} is not")

    def _plan_extra(self, module: str, method: AnyMethod, keys: Mapping[str, str]) -> bool:
        """Plan a layer that the checkpoint holds and the config does not mean; tell whether it can be one."""
        if module not in self.catalog.modules:
            self._problem(f"{next(iter(keys.values()))}: the model has no {module}{_nearest(module, self.catalog)}")
            return False
        site = next((site for site in self.catalog.sites_at(module) if site.key == module), None)
        if site is None:
            layer = self.catalog.modules[module]
            why = refusal(layer) or f"kinds that can: {kinds()}"
            self._problem(f"{module} ({type(layer).__name__}) cannot carry an adapter; {why}")
            return False
        self._plan_site(site, method, keys)
        return True

    def _plan_site(self, site: Site, method: AnyMethod, keys: Mapping[str, str], twins: Sequence[Site] = ()) -> None:
        method.check_site(site)
        settings = self._settings(method, site, {leaf: self._shape(key) for leaf, key in keys.items()})
        shapes = method.shapes(settings, site)
        problems = [
            f"{site.key}: {leaf} is in the checkpoint, and this layer and config have no such tensor"
            for leaf in keys
            if leaf not in shapes
        ]
        for leaf, shape in shapes.items():
            if leaf not in keys:
                problems.append(f"{site.key}: {leaf} is missing from the checkpoint")
            elif self._shape(keys[leaf]) != shape:
                stored = self._shape(keys[leaf])
                problems.append(
                    f"{site.key}: size mismatch: {leaf} is {stored}, and this layer and config want {shape}"
                )
            else:
                floating = not method.leaf(leaf).integer
                problems += _of_wrong_kind(f"{site.key}: {leaf}", self.tensors[keys[leaf]], floating)
        self.plan.problems += problems
        if not problems:
            self.plan.bindings.append(Binding(site, method, settings, dict(keys), twins))

    def _settings(self, method: AnyMethod, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """Return what the config means for a layer; of several readings, the first that gives it these shapes."""
        settings = method.settings(self.config, site)
        if not isinstance(method, SettledByCheckpoint):
            return settings
        readings = method.settings_from_shapes(self.config, settings, site, shapes)
        return next((reading for reading in readings if shapes == method.shapes(reading, site)), readings[0])

    # -- whole modules and shared tensors ------------------------------------------------------------------

    def _plan_whole_module(self, key: str, slot: Slot) -> None:
        catalog, tensor = self.catalog, self.tensors[key]
        ends = [name for name in (*catalog.input_embeddings, *catalog.output_embeddings) if name not in self._whole]
        root = next((name for name in (*self._whole, *ends) if is_inside(slot.module, [name])), None)
        if root is None:
            unknown = f"; the model has no {slot.module}{_nearest(slot.module, catalog)}"
            where = "" if slot.module in catalog.modules else unknown
            self._problem(f"{key}: neither a tensor of this method nor in modules_to_save{where}")
            return
        name = f"{slot.module}.{slot.leaf}"[len(root) + 1 :]
        parameter = catalog.modules[root].state_dict(keep_vars=True).get(name)
        if parameter is None:
            self._problem(f"{key}: {root} has no parameter {name}")
        elif tuple(parameter.shape) != self._shape(key):
            rows = tensor.shape[0] if catalog.is_embedding(root) else 0
            mend = f" (resize the base first: resize_token_embeddings({rows}))" if rows else ""
            self._problem(
                f"{key}: size mismatch: is {self._shape(key)}, and the model's is {tuple(parameter.shape)}{mend}"
            )
        elif problems := _of_wrong_kind(key, tensor, _is_floating(parameter)):
            self.plan.problems += problems
        else:
            self.plan.whole_modules.setdefault(root, {})[name] = key

    def _check_shared(self) -> None:
        if not isinstance(self.method, StoresShared):
            return
        shapes = self.method.shared_shapes(self.config, self._own_sites())
        integers = {leaf.name for leaf in self.method.shared if leaf.integer}
        self.plan.problems += [
            f"{name}: in the checkpoint, and this model and config have no such tensor"
            for name in self.plan.shared
            if name not in shapes
        ]
        for name, shape in shapes.items():
            if name in self.plan.shared:
                key = self.plan.shared[name]
                if self._shape(key) != shape:
                    self._problem(
                        f"{name}: size mismatch: is {self._shape(key)}, and this model and config want {shape}"
                    )
                floating = name.partition(".")[0] not in integers
                self.plan.problems += _of_wrong_kind(name, self.tensors[key], floating)
            elif self.method.saves_shared(self.config):
                self._problem(f"{name}, which all layers share, is missing from the checkpoint")

    def _own_sites(self) -> list[Site]:
        """Return the layers of the adapter's own method."""
        return [binding.site for binding in self.plan.bindings if binding.method is self.method]

    def _check_whole_modules_filled(self) -> None:
        for root in self._whole:
            parameters = self.catalog.modules[root].state_dict(keep_vars=True).keys()
            self.plan.problems += [
                f"{root}.{name}: the config saves {root} whole, and the checkpoint does not fill it"
                for name in sorted(parameters - self.plan.whole_modules.get(root, {}).keys())
            ]


def _of_wrong_kind(what: str, tensor: HasShape, floating: bool) -> list[str]:
    """Return a problem where whole numbers are in the place of weights, or the other way round."""
    if _is_floating(tensor) == floating:
        return []
    numbers = "floating-point numbers" if floating else "whole numbers"
    return [f"{what} is of dtype {str(tensor.dtype).removeprefix('torch.')}, and {numbers} belong there"]


def _is_floating(tensor: HasShape) -> bool:
    """Tell by the dtype's name, in a header or in torch."""
    return str(tensor.dtype).removeprefix("torch.").lower().startswith(("f", "bf"))


def _nearest(module: str, catalog: Catalog) -> str:
    ending = module.rpartition(".")[2]
    alike = [name for name in catalog.modules if name.rpartition(".")[2] == ending]
    carriers = [name for name, linear in catalog.linear.items() if linear]
    near = difflib.get_close_matches(module, alike or carriers, n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def bind_error(plan: Plan, config: AnyConfig, origin: str, total: int, catalog: Catalog) -> BindError:
    """Return the one error for all of a plan's problems."""
    bound = len(plan.keys)
    shown = "; ".join(plan.problems[:MAX_PROBLEMS_SHOWN])
    more = f"; and {len(plan.problems) - MAX_PROBLEMS_SHOWN} more" if len(plan.problems) > MAX_PROBLEMS_SHOWN else ""
    return BindError(
        f"The adapter {origin} does not fit {catalog.describe()}: {bound} of {total} tensors bind. {shown}{more}.",
        problems=plan.problems,
        hint=f"It names {config.base_model_name_or_path or 'no model'} as its base; load it on that one, or pass "
        "strict=False to use only what fits.",
    )
