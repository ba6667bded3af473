"""The set of adapters on a model: add, select, rename, delete, merge, take off again.

The base model is edited in one way only: an adapted layer is put in the place of its base layer, which it holds.
Taking it out again leaves the model as it was, bit for bit.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer import sharding
from veneer.attention_layer import AdaptedAttention
from veneer.block_layer import AdaptedBlock
from veneer.catalog import Catalog
from veneer.checkpoint import Checkpoint
from veneer.codec import SHARED_PREFIX, encode
from veneer.config import HEADS, AnyConfig, PeftConfig, PromptConfig, TargetedConfig
from veneer.errors import (
    AdapterError,
    BindError,
    DuplicateAdapterError,
    MergeError,
    NonFiniteError,
    TargetError,
    UnknownAdapterError,
    UnsupportedError,
)
from veneer.layer import AdaptedLayer, Bound, Untouched
from veneer.merging.direct import Unwrapped
from veneer.merging.into_packed import choose, dequantize, forget_loading, measured
from veneer.merging.new_bias import new_biases
from veneer.merging.quantized import DEQUANTIZED, QuantizedMerge
from veneer.merging.threads import for_each
from veneer.methods import AnyMethod, method_of, prompt_of
from veneer.methods.method import Base, Method
from veneer.methods.prompt import AnyPrompt, PromptEncoder
from veneer.mixture import check_unused, meet_experts
from veneer.packed_layer import PackedLayer
from veneer.parameter_layer import AdaptedParameter
from veneer.plan import Binding, Plan, bind_error, make_plan
from veneer.positions import watch
from veneer.prompts import Prompts, complete, place_of, words_of
from veneer.replication import Replication
from veneer.saved import SavedModule
from veneer.scalings import Scalings
from veneer.selection import BASE, NOTHING, Selection, Switch
from veneer.shadows import Shadows
from veneer.sharded_layer import ShardedLayer
from veneer.sites import PackedSite, ParameterSite, Site
from veneer.sites.attention import AttentionSite
from veneer.sites.block import BlockSite
from veneer.targets import names_match, only_parameters
from veneer.tied import check_both, name_both, parted, tied_ends


@dataclass
class Adapter:
    """One adapter on a model.

    Attributes:
        name: its name here.
        config: its config.
        origin: where it came from; ``None`` for one made here.
        layers: the names of the layers it adapts, in the model's order.
        saved: the names of the modules that it brings whole.
        trainable: whether its tensors are to be trained while it is selected.
        zero: those of ``layers`` in which it changes nothing, known when it was loaded.
        bound: how many of its checkpoint's tensors are in use.
        base_digest: the digest of the base it was trained on, where the checkpoint records it.
        notes: what was odd about it.
        shared: the tensors that all of its layers use.
        stored: checkpoint key -> tensor, where what is in memory is padded and this is to be saved.
        virtual_tokens: how many it puts before the input or into the cache; none for a method that adapts layers.
        allocation: what training has learned of an AdaLoRA's ranks, or of an AdaMSS's groups.
        dtypes: checkpoint key -> dtype on disk, for tensors that are wider in memory and saved as they were.
        alone: whether no other such adapter can be active beside it.
    """

    name: str
    config: AnyConfig
    origin: str | None = None
    layers: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    trainable: bool = False
    zero: list[str] = field(default_factory=list)
    bound: int = 0
    base_digest: str | None = None
    notes: list[str] = field(default_factory=list)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    virtual_tokens: int = 0
    allocation: Any = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    alone: bool = False


class Adapters:
    """All adapters of one base model.

    Args:
        model: the base model, carrying no adapters (else ``BaseModelError``).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.catalog = Catalog(model)
        self.switch = Switch()
        self.entries: dict[str, Adapter] = {}
        self.layers: dict[str, AdaptedLayer] = {}
        self.saved: dict[str, SavedModule] = {}
        # What the last merge into quantised weights lost.
        self.quantized_merge: QuantizedMerge | None = None
        self.prompts = Prompts(self.switch)
        self.scalings = Scalings()
        self.shadows = Shadows()
        # Where the base's own parameters wanted gradients, before the first adapter came.
        self._was_trainable: list[tuple[nn.Module, str]] | None = None
        # Which blocks the model has several times.
        self._replication: Replication | None = None
        # Hooks on the base, while an adapter needs to know which tokens are read.
        self._watching: list[RemovableHandle] = []
        # Whether adapters that are loaded can be run: see unwrapped.
        self._wraps = True

    # -- adding --------------------------------------------------------------------------------------------

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Wrap nothing inside the ``with`` block, in which adapters are loaded and merged for good.

        Packed layers are wrapped all the same, for their wrapper does the merge, and so are those that are spread over
        processes, which refuse it.
        """
        self._wraps = False
        try:
            yield
        finally:
            self._wraps = True

    @contextmanager
    def replicated(self, config: PeftConfig) -> Iterator[None]:
        """Let the model have the blocks that ``config`` wants, while an adapter is added; undone if that fails.

        Raises:
            AdapterError: the adapters that are there are for other blocks.
        """
        wanted = [list(pair) for pair in getattr(config, "layer_replication", None) or ()]
        present = [] if self._replication is None else self._replication.ranges
        if wanted == present:
            yield
            return
        if self.entries:
            raise AdapterError(
                f"The adapter has layer_replication={wanted or None}, and this model's adapters {present or None}.",
                hint="Load it on another copy of the base.",
            )
        self._whole_again()
        self._replication = Replication(self.model, wanted) if wanted else None
        self.catalog = Catalog(self.model)
        try:
            yield
        except BaseException:
            self._whole_again()
            raise

    def _whole_again(self) -> None:
        """Give the model the blocks that it came with."""
        if self._replication is not None:
            self._replication.undo()
            self._replication = None
            self.catalog = Catalog(self.model)

    def load(
        self,
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
        self.check_new(name)
        config = checkpoint.config
        method = self._kind(config)
        self._meet_experts(config)
        plan = make_plan(_known(config), method, checkpoint.tensors, self.catalog)
        self._settle(plan, checkpoint, strict)
        tensors = checkpoint.read(plan.keys)
        if trainable and not isinstance(config, PromptConfig):
            self._check_trained_alike(_known(config), plan, tensors)
        sums = check_finite(tensors, checkpoint.origin)
        notes = [*checkpoint.notes, *plan.notes]
        adapter = Adapter(name, _known(config), checkpoint.origin, trainable=trainable, notes=notes)
        adapter.bound = len(plan.keys)
        stored = {leaf: tensors[key] for leaf, key in plan.shared.items()}
        if isinstance(config, PromptConfig):
            self._restore_prompt(adapter, config, stored, float32, trainable)
        else:
            self._restore_layers(adapter, plan, tensors, stored, float32, trainable)
            self.note_zero_layers(adapter, _sure_to_change(plan, sums))
        for root, keys in plan.saved.items():
            values = {leaf: tensors[key] for leaf, key in keys.items()}
            self._saved(root).add(name, values).requires_grad_(trainable)
            adapter.saved.append(root)
            if not trainable:
                adapter.dtypes.update(
                    {encode(root, leaf, method.prefix): tensor.dtype for leaf, tensor in values.items()}
                )
        self._join_saved(adapter)
        self._added(adapter)
        return adapter

    def _kind(self, config: PeftConfig) -> AnyMethod | AnyPrompt:
        """The method of a config; that of a prompt is completed with the model's sizes."""
        if not isinstance(config, PromptConfig):
            return method_of(_known(config))
        method = prompt_of(config)
        complete(config, method, self.model)
        return method

    def _meet_experts(self, config: PeftConfig) -> None:
        if isinstance(config, TargetedConfig) and config.experts:
            meet_experts(config, self)

    def _restore_layers(
        self,
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
            parameters.update(self._restored(binding, config))
            made.append(_Made(binding.site, binding.method, binding.settings, parameters, binding.twin))
        made = _join(made, method_of(config), tied_ends(config, self.catalog), new=False, trainable=trainable)
        self._bind(adapter, made, self._shared(config, method_of(config), made, stored, float32, trainable, None))

    def _restore_prompt(
        self, adapter: Adapter, config: PromptConfig, stored: dict[str, Tensor], float32: bool, trainable: bool
    ) -> None:
        device = place_of(self.model)
        own = {leaf: _parameter(tensor, device, float32, trainable) for leaf, tensor in stored.items()}
        self._add_prompt(adapter, config, prompt_of(config).restored(config, own))

    def _add_prompt(self, adapter: Adapter, config: PromptConfig, encoder: PromptEncoder) -> None:
        self.prompts.add(adapter.name, config, prompt_of(config), encoder, self.model)
        adapter.virtual_tokens = config.num_virtual_tokens or 0

    def _restored(self, binding: Binding, config: TargetedConfig) -> dict[str, nn.Parameter]:
        """The tensors of a layer that are in no checkpoint, and never trained."""
        site = binding.site
        found = binding.method.restored(config, binding.settings, lambda: self._base(site))
        return {leaf: _parameter(tensor, site.device, True, False) for leaf, tensor in found.items()}

    def create(self, name: str, config: PeftConfig, *, generator: torch.Generator | None = None) -> Adapter:
        """Add a new, trainable adapter, with tensors in float32.

        Raises:
            TargetError: the config's targets match nothing usable.
            DuplicateAdapterError: the name is taken.
        """
        self.check_new(name)
        config.check_honoured()
        self._meet_experts(config)
        adapter = Adapter(name, _known(config), trainable=True)
        name_both(adapter.config, self.catalog)
        roots = self.catalog.saved(adapter.config)
        self._check_saved_exist(adapter.config)
        if isinstance(config, PromptConfig):
            self._kind(config)
            self._check_places([], roots)
            words = words_of(self.model)
            encoder = prompt_of(config).new(config, words, generator)
            if self.is_spread:
                sharding.agree(encoder.state_dict().values())
            self._add_prompt(adapter, config, encoder.to(next(words.parameters()).device))
        else:
            self._create_layers(adapter, targeted(config), roots, generator)
        for root in roots:
            self._saved(root).add(name).requires_grad_(True)
            adapter.saved.append(root)
        self._join_saved(adapter)
        self._added(adapter)
        return adapter

    def _create_layers(
        self, adapter: Adapter, config: TargetedConfig, roots: list[str], generator: torch.Generator | None
    ) -> None:
        method = method_of(config)
        method.complete(config, self.catalog)
        # The layers' names take the place of "all-linear" before anything else depends on them.
        if not only_parameters(config):
            self.catalog.spell_out(config, self.catalog.targets(config))
        parts = [part for part in method.parts(config, self.catalog) if not part.optional]
        self._check_spread([site for part in parts for site in part.sites], roots)
        self._check_places([site.name for part in parts for site in part.sites], roots)
        made = []
        for part in parts:
            for site in part.sites:
                part.method.check_site(site)
                settings = part.method.settings(config, site)
                tensors = part.method.init(config, settings, self._base(site), generator)
                parameters = {
                    leaf: _parameter(t, site.device, True, part.method.trains(leaf)) for leaf, t in tensors.items()
                }
                made.append(_Made(site, part.method, settings, parameters, part.twins.get(site.id)))
        shared = self._shared(config, method, made, {}, True, True, generator)
        for one, more in self._beside(config, method, made, shared):
            needed = one.method.shapes(one.settings, one.site).keys() - one.tensors.keys() - one.method.optional
            one.tensors.update(
                (leaf, _parameter(more[leaf], one.site.device, True, one.method.trains(leaf)))
                for leaf in one.method.leaves
                if leaf in needed & more.keys()
            )
        made = _join(made, method, tied_ends(config, self.catalog), new=True, trainable=True)
        if self.is_spread:
            sharding.agree([*(t for one in made for t in one.tensors.values()), *shared.values()])
        self._bind(adapter, made, shared)
        self.note_zero_layers(adapter)

    def _shared(
        self,
        config: TargetedConfig,
        method: AnyMethod,
        made: Sequence[_Made],
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
        fresh = method.make_shared(config, [self._base(site) for site in sites], generator) if missing else {}
        return {
            leaf: _parameter(tensor, sites[0].device, float32, trainable and method.trains_shared_leaf(config, leaf))
            for leaf, tensor in {**fresh, **stored}.items()
        }

    def _beside(
        self, config: TargetedConfig, method: AnyMethod, made: Sequence[_Made], shared: Mapping[str, nn.Parameter]
    ) -> list[tuple[_Made, Mapping[str, Tensor]]]:
        """Each layer of an adapter's own method, with what joins its tensors there."""
        own = [one for one in made if one.method is method]
        if not own:
            return []
        return list(zip(own, method.beside(config, [self._base(one.site) for one in own], shared), strict=True))

    def _bind(self, adapter: Adapter, made: Sequence[_Made], shared: dict[str, nn.Parameter]) -> None:
        """Put tensors that are ready into their layers; from here on nothing can fail."""
        adapter.shared = shared
        # The adapter's own method alone has such tensors; its companions (biases ...) have none.
        config = targeted(adapter.config)
        _tie(method_of(config), config, made)
        beside = {id(one): more for one, more in self._beside(config, method_of(config), made, shared)}
        if shared:
            self._layer(made[0].site).hold(adapter.name, shared)
        for one in made:
            layer = self._layer(one.site)
            settings = one.method.settled(one.settings, one.tensors, layer)
            joining = _frozen(beside.get(id(one), {}), one.tensors, one.site)
            layer.hold(adapter.name, {k: t for k, t in joining.items() if not any(t is s for s in shared.values())})
            share = Bound(one.method, settings, tuple(one.tensors), one.site.key, joining)
            layer.bind(adapter.name, share, one.tensors)
            adapter.layers.append(one.site.id)
            if one.twin is not None:
                twin_settings = one.method.settings(adapter.config, one.twin)
                key = one.twin.key if one.method.saves_twins else None
                twin = Bound(one.method, twin_settings, tuple(one.tensors), key)
                self._layer(one.twin).bind(adapter.name, twin, one.tensors)
                adapter.layers.append(one.twin.id)
        adapter.layers = list(dict.fromkeys(adapter.layers))
        adapter.alone = any(one.method.alone for one in made)

    def note_zero_layers(self, adapter: Adapter, sure: Collection[str] = ()) -> None:
        """Find the layers in which an adapter changes nothing; those in ``sure`` need not be looked at."""
        adapter.zero = [
            name
            for name in adapter.layers
            if name not in sure and not any(patch.changes() for patch in self.layers[name].patches([adapter.name]))
        ]

    def _base(self, site: Site) -> Base:
        """A base layer as it was before any adapter, for a method to start from."""
        return self.layers.get(site.id) or Untouched(site)

    def check_new(self, name: str) -> None:
        """Raise ``DuplicateAdapterError`` unless ``name`` can be a new adapter's."""
        if not isinstance(name, str) or not name or name == BASE or any(c in name for c in "./\\"):
            raise DuplicateAdapterError(
                f"{name!r} cannot be an adapter's name.",
                hint=f"A name is a non-empty string without dots and slashes, and not {BASE!r}.",
            )
        if name in self.entries:
            raise DuplicateAdapterError(
                f"There is an adapter {name!r} on this model already.",
                hint=f"Choose another adapter_name, or delete_adapter({name!r}) first. Present: {self._present()}.",
            )

    def _settle(self, plan: Plan, checkpoint: Checkpoint, strict: bool) -> None:
        if plan.problems:
            error = bind_error(
                plan, _known(checkpoint.config), checkpoint.origin, len(checkpoint.tensors), self.catalog
            )
            if strict or not plan.keys:
                raise error
            warnings.warn(error.message + " What fits is used (strict=False).", stacklevel=5)
            plan.notes += plan.problems
        self._check_spread([b.site for b in plan.bindings], list(plan.saved))
        self._check_places([b.site.name for b in plan.bindings], list(plan.saved))

    def _check_saved_exist(self, config: AnyConfig) -> None:
        """A module that is to be saved whole must be there; of a task's usual heads one is enough."""
        usual = HEADS.get(str(config.task_type), ())
        for name in set(config.modules_to_save or ()) - set(usual):
            if not any(names_match(module, [name]) for module in self.catalog.modules):
                raise TargetError(
                    f"modules_to_save names {name!r}, and the model has no such module.",
                    hint=f"Its output layer is {' or '.join(self.catalog.outputs) or 'unknown'}.",
                )

    def _check_spread(self, sites: list[Site], roots: list[str]) -> None:
        """Of a base that is spread over processes, not every layer can be adapted in every way."""
        for site in sites:
            sharding.check_site(site)
        for root in roots:
            sharding.check_copy(root, self.catalog.modules[root])

    def _check_places(self, sites: list[str], roots: list[str]) -> None:
        """One adapter's whole module cannot hold another's adapted layer, nor the reverse."""
        for outer, inner in ((self.saved, sites), (roots, list(self.layers))):
            for name in inner:
                root = next((r for r in outer if name == r or name.startswith(r + ".")), None)
                if root is not None:
                    raise BindError(
                        f"{root} is saved whole by one adapter and {name} adapted by another; one model cannot hold "
                        "both.",
                        hint="Load them on two copies of the base, or delete the first.",
                    )

    def _layer(self, site: Site) -> AdaptedLayer:
        if site.id not in self.layers:
            there = self._at(site.name)
            self.layers[site.id] = layer = self._wrapped(site, there if isinstance(there, AdaptedLayer) else None)
            if isinstance(layer, AdaptedLayer):
                self._put(site.name, layer)
        return self.layers[site.id]

    def _wrapped(self, site: Site, there: AdaptedLayer | None) -> AdaptedLayer:
        if isinstance(site, PackedSite):
            return PackedLayer(site, self.switch)
        if sharding.is_tensor_parallel(site.module):
            return ShardedLayer(site, self.switch, there)
        if not self._wraps:
            # Not one, but it answers all that is asked of one until it is merged.
            return cast(AdaptedLayer, Unwrapped(site))
        if isinstance(site, AttentionSite):
            return AdaptedAttention(site, self.switch)
        if isinstance(site, BlockSite):
            return AdaptedBlock(site, self.switch)
        kind = AdaptedParameter if isinstance(site, ParameterSite) else AdaptedLayer
        return kind(site, self.switch, there)

    @property
    def is_spread(self) -> bool:
        """Whether the base is spread over processes."""
        return sharding.sharded_parameter(self.catalog.modules.values()) is not None

    def _take_off(self, site_id: str) -> None:
        """Remove a wrapper; one around it holds what it held."""
        layer = self.layers.pop(site_id)
        outer = self._at(layer.site.name)
        if outer is layer:
            self._put(layer.site.name, layer.base_layer)
            return
        while isinstance(outer, AdaptedLayer) and outer.base_layer is not layer:
            outer = outer.base_layer
        if isinstance(outer, AdaptedLayer):  # else the layer never stood in the model
            outer._modules["base_layer"] = layer.base_layer

    def _saved(self, root: str) -> SavedModule:
        if root not in self.saved:
            self.saved[root] = SavedModule(self.catalog.modules[root], self.switch)
            if self._wraps:
                self._put(root, self.saved[root])
        return self.saved[root]

    def _at(self, name: str) -> nn.Module:
        """What stands at a name now: the base's own module, or a wrapper."""
        parent, _, child = name.rpartition(".")
        module = self.catalog.modules[parent]._modules[child]
        assert module is not None
        return module

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.catalog.modules[parent]._modules[child] = module

    def _join_saved(self, adapter: Adapter) -> None:
        """Let two copies of layers that share a weight, and are to stay alike, share theirs where it is the same."""
        for pair in tied_ends(adapter.config, self.catalog):
            if set(pair) <= set(adapter.saved):
                one, other = (self._copy(root, adapter.name)._parameters for root in pair)
                if _equal(one["weight"], other["weight"]):
                    other["weight"] = one["weight"]

    def _check_trained_alike(self, config: AnyConfig, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        """Of two layers that are to stay alike both must be there, and be the same where they come whole."""
        pairs = tied_ends(config, self.catalog)
        adapted = [binding.site.name for binding in plan.bindings if binding.method is method_of(config)]
        check_both(pairs, [*adapted, *plan.saved])
        for pair in pairs:
            if set(pair) <= plan.saved.keys():
                one, other = (tensors[plan.saved[root]["weight"]] for root in pair)
                if not _equal(one, other):
                    raise parted(pair)

    def _stay_alike(self, names: Sequence[str]) -> bool:
        """Whether adapters change two layers that share a weight by the same tensors."""

        def used(end: str) -> set[int]:
            layers = [layer for layer in self.layers.values() if layer.site.name == end]
            return {
                id(tensor)
                for layer in layers
                for name in layer.here(tuple(names))
                for share in layer.bound[name]
                for tensor in layer.tensors(name, share).values()
            }

        alike = all(getattr(self.entries[name].config, "ensure_weight_tying", False) for name in names)
        return alike and any(used(one) and used(one) == used(other) for one, other in self.catalog.tied_ends)

    def _note_ties(self, adapter: Adapter) -> None:
        """Tell of an adapter that changes one of two layers that share a weight, and not the other."""
        pairs = self.catalog.tied_ends
        touched = {*(self.layers[site].site.name for site in adapter.layers), *adapter.saved}
        for one, other in [*pairs, *((b, a) for a, b in pairs)]:
            if one in touched and other not in touched:
                adapter.notes.append(
                    f"{one} is changed and {other}, which shares its weight in the base, is not; merged, each has its "
                    "own."
                )

    def _added(self, adapter: Adapter) -> None:
        self._note_ties(adapter)
        method = self._kind(adapter.config)
        if isinstance(method, Method) and method.invocation(adapter.config) and not self._watching:
            self._watching = watch(self.model)
        if self._was_trainable is None:
            self._was_trainable = _trainable(self.catalog.modules.values())
            for module, leaf in self._was_trainable:
                getattr(module, leaf).requires_grad_(False)
        self.entries[adapter.name] = adapter
        self.scalings.watch(self)
        self.shadows.watch(self)
        if adapter.trainable and sharding.is_data_parallel(self.catalog.modules.values()):
            sharding.average_gradients(self.parameters(adapter.name))

    # -- selecting -----------------------------------------------------------------------------------------

    @property
    def active(self) -> list[str]:
        """The selected adapters, in the order in which they apply."""
        return list(self.switch.selection.names)

    def select(self, names: str | Sequence[str]) -> None:
        """Make ``names`` the standing selection. Costs the same for any number of layers and adapters.

        Only where adapters are being trained are their tensors visited: those selected get gradients, the other
        trainable ones none.
        """
        wanted = self.selection(names)
        self.switch.standing = wanted
        used = {*wanted.names, *(expert for name in wanted.names for expert in self.entries[name].config.experts)}
        for adapter in self.entries.values():
            if adapter.trainable:
                self.require_grad(adapter, adapter.name in used)

    def selection(self, names: str | Sequence[str]) -> Selection:
        """The checked selection of one adapter or of several at once."""
        wanted = (names,) if isinstance(names, str) else tuple(names)
        for name in wanted:
            self.get(name)
        if len(set(wanted)) != len(wanted):
            raise AdapterError(f"{list(wanted)} names an adapter twice.", hint="Name each once.")
        prompts = [name for name in wanted if name in self.prompts]
        if len(prompts) > 1:
            raise AdapterError(
                f"{prompts[0]!r} and {prompts[1]!r} are prompts; they cannot be active together.",
                hint="Select one of them, or give each row of a batch its own with adapter_names=[...].",
            )
        alone = [name for name in wanted if self.entries[name].alone]
        if len(alone) > 1:
            raise AdapterError(
                f"{alone[0]!r} and {alone[1]!r} each put another weight in the base's place (LoftQ); they cannot be "
                "active together.",
                hint="Select one of them, or load them on a base that is quantised.",
            )
        holders: dict[str, str] = {}
        for name in wanted:
            for root in self.entries[name].saved:
                if root in holders:
                    raise AdapterError(
                        f"{holders[root]!r} and {name!r} both bring {root} whole; they cannot be active together.",
                        hint="Select one of them.",
                    )
                holders[root] = name
        return Selection(wanted)

    def rows(self, names: Iterable[str | tuple[str, int]]) -> Selection:
        """The checked selection of one adapter (or ``"__base__"``) for each row of a batch.

        ``(name, tokens)`` instead of a name stands for so many tokens of a packed sequence.
        """
        asked = list(names)
        by_token = any(not isinstance(one, str) for one in asked)
        if by_token:
            asked = [name for name, tokens in map(_segment, asked) for _ in range(tokens)]
        wanted = tuple(map(str, asked))
        for name in set(wanted) - {BASE}:
            self.get(name)
        self.prompts.check_rows(wanted)
        return Selection(rows=wanted, by_token=by_token)

    def during(self, selection: Selection) -> AbstractContextManager[None]:
        """Use ``selection`` inside a ``with`` block, in this thread or task only."""
        return self.switch.during(selection)

    def disabled(self) -> AbstractContextManager[None]:
        """The base model alone inside a ``with`` block, in this thread or task only."""
        return self.switch.during(NOTHING)

    def get(self, name: str) -> Adapter:
        """An adapter by name, or ``UnknownAdapterError``."""
        if name not in self.entries:
            near = difflib.get_close_matches(str(name), self.entries, n=1)
            raise UnknownAdapterError(
                f"There is no adapter {name!r} on this model.",
                hint=(f"Did you mean {near[0]!r}? " if near else "") + f"Present: {self._present()}.",
            )
        return self.entries[name]

    def require_grad(self, adapter: Adapter, required: bool) -> None:
        """Turn the gradients of an adapter's tensors on or off."""
        for parameter in self.parameters(adapter.name):
            parameter.requires_grad_(required)

    def _present(self) -> str:
        return ", ".join(map(repr, self.entries)) or "none"

    # -- tensors -------------------------------------------------------------------------------------------

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Every parameter of an adapter that is trained."""
        adapter = self.get(name)
        if name in self.prompts:
            return [*self.prompts.encoder(name).trained(), *self._saved_parameters(adapter)]
        own = {
            id(p): p
            for module in adapter.layers
            for share in self.layers[module].bound[name]
            for leaf, p in self.layers[module].tensors(name, share).items()
            if share.method.trains(leaf)
        }
        if adapter.shared:
            trains = method_of(adapter.config).trains_shared_leaf
            own.update((id(p), p) for leaf, p in adapter.shared.items() if trains(adapter.config, leaf))
        return [*own.values(), *self._saved_parameters(adapter)]

    def _saved_parameters(self, adapter: Adapter) -> list[nn.Parameter]:
        found = [p for root in adapter.saved for p in self._copy(root, adapter.name).parameters()]
        return list({id(p): p for p in found}.values())

    def named_tensors(
        self, name: str, value: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> list[tuple[str, Tensor]]:
        """Each tensor of an adapter that is saved: its checkpoint key, itself, or what ``value`` puts in its place."""
        adapter = self.get(name)
        found: list[tuple[str, Tensor]] = []
        if name in self.prompts:
            found += [(key, value(tensor)) for key, tensor in self.prompts.encoder(name).tensors().items()]
        for module in adapter.layers:
            layer = self.layers[module]
            for share in layer.bound[name]:
                if share.key is not None:
                    tensors = {leaf: value(tensor) for leaf, tensor in layer.tensors(name, share).items()}
                    saved = share.method.on_disk(share.settings, tensors)
                    found += [(encode(share.key, leaf), tensor) for leaf, tensor in saved.items()]
        if adapter.shared and method_of(adapter.config).saves_shared(adapter.config):
            found += [(SHARED_PREFIX + leaf, value(tensor)) for leaf, tensor in adapter.shared.items()]
        prefix = self._kind(adapter.config).prefix
        for root in adapter.saved:
            own = self._copy(root, name).state_dict(keep_vars=True)
            found += [(encode(root, leaf, prefix), value(tensor)) for leaf, tensor in own.items()]
        return found

    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of an adapter's tensors in memory."""
        adapter = self.get(name)
        own = {
            tensor.dtype
            for module in adapter.layers
            for share in self.layers[module].bound[name]
            for tensor in self.layers[module].tensors(name, share).values()
        }
        whole = [tensor for root in adapter.saved for tensor in self._copy(root, name).state_dict().values()]
        prompt = self.prompts.encoder(name).tensors().values() if name in self.prompts else ()
        return own | {tensor.dtype for tensor in (*adapter.shared.values(), *whole, *prompt)}

    def config_on_disk(self, name: str) -> AnyConfig:
        """The config that goes with :meth:`named_tensors`."""
        adapter = self.get(name)
        shares = [share for module in adapter.layers for share in self.layers[module].bound[name]]
        if any(share.method.frozen.intersection(share.leaves) for share in shares):
            converted: TargetedConfig = method_of(adapter.config).config_on_disk(adapter.config)
            return converted
        return adapter.config

    def _copy(self, root: str, name: str) -> nn.Module:
        own: nn.Module = self.saved[root].copies[name]
        return own

    # -- changing the set ----------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        """Remove an adapter. If it was selected, the rest of the selection stays (the base alone if none)."""
        adapter = self.get(name)
        check_unused(name, self)
        for module in adapter.layers:
            self._leave(module, name)
        if name in self.prompts:
            self.prompts.remove(name)
        for root in adapter.saved:
            self.saved[root].remove(name)
            if not self.saved[root].copies:
                self._put(root, self.saved.pop(root).original_module)
        del self.entries[name]
        self.scalings.watch(self)
        self.shadows.watch(self)
        kept = self.switch.standing.names
        self.switch.standing = Selection(tuple(other for other in kept if other != name))

    def _leave(self, module: str, name: str) -> None:
        layer = self.layers[module]
        if name in layer.merged:
            layer.merge(tuple(other for other in layer.merged if other != name))
        layer.unbind(name)
        if not layer.bound:
            self._take_off(module)

    def leave_layers(self, adapter: Adapter, modules: Iterable[str]) -> None:
        """Take an adapter off some of its layers."""
        for module in modules:
            self._leave(module, adapter.name)
            adapter.layers.remove(module)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; it keeps its place in the order."""
        adapter = self.get(old)
        if new == old:
            return
        self.check_new(new)
        check_unused(old, self)
        for module in adapter.layers:
            self.layers[module].rename(old, new)
        if old in self.prompts:
            self.prompts.rename(old, new)
        for root in adapter.saved:
            self.saved[root].rename(old, new)
        adapter.name = new
        self.entries = {entry.name: entry for entry in self.entries.values()}
        names = self.switch.standing.names
        self.switch.standing = Selection(tuple(new if name == old else name for name in names))

    # -- merging -------------------------------------------------------------------------------------------

    def merge(self, names: Sequence[str] | None, *, check: bool = False, into: str | None = None) -> None:
        """Put adapters into the base weights, to be undone by :meth:`unmerge`, and select them.

        The original weights are kept, so this costs memory for a second copy of each adapted layer. What is
        merged already stays merged. Any other selection is still right afterwards, only slower.
        """
        wanted = list(self.switch.standing.names if names is None else names)
        merged = [name for name in self.entries if any(name in layer.merged for layer in self.layers.values())]
        selection = self.selection(list(dict.fromkeys([*merged, *wanted])))
        self.check_mergeable(selection.names)
        packed = choose(self.layers.values(), selection.names, into, self.catalog.dtype)
        if check:
            self._check_merge(selection.names)
        self._change(self.layers.values(), lambda layer: layer.merge(selection.names))
        self.select(selection.names)
        self.quantized_merge = measured(packed) or self.quantized_merge

    def _change(self, layers: Collection[AdaptedLayer], action: Callable[[AdaptedLayer], None]) -> None:
        """Change the weights of layers: several at a time where they lie in memory and are torch's own."""
        # Layers of one module change its bias in turn.
        groups: dict[int, list[AdaptedLayer]] = {}
        for layer in layers:
            groups.setdefault(id(layer.site.module), []).append(layer)

        def run(group: list[AdaptedLayer]) -> None:
            for layer in group:
                action(layer)

        if all(map(_is_in_memory, layers)):
            for_each(run, groups.values())
        else:
            for group in groups.values():
                run(group)

    def unmerge(self) -> None:
        """Take every merged adapter out again: the base weights get their original bytes back."""
        for layer in self.layers.values():
            layer.unmerge()

    def merge_and_unload(
        self, names: Sequence[str] | None, *, check: bool = False, into: str | None = None
    ) -> nn.Module:
        """Put adapters into the base weights for good and take the adapter layers off."""
        wanted = self.selection(list(self.switch.standing.names if names is None else names)).names
        self.check_mergeable(wanted)
        packed = choose(self.layers.values(), wanted, into, self.catalog.dtype)
        added = new_biases(self.layers.values(), wanted, self.catalog.model)
        if check:
            self._check_merge(wanted)
        here = [layer for layer in self.layers.values() if layer.here(wanted)]
        self._change(here, lambda layer: layer.store_merged(wanted))
        changed, alike = bool(wanted), self._stay_alike(wanted)
        for root, saved in self.saved.items():
            own = saved.here(wanted)
            if own:
                self.catalog.modules[root] = saved.original_module = saved.taken_over(own[0])
        model = self.unload(keep=True)
        added.put_into(model)
        if changed:
            _untie(model, alike)
        if packed:
            self.quantized_merge = measured(packed)
            if into == DEQUANTIZED:
                dequantize(model, self.catalog.dtype)
            forget_loading(model)
            self.catalog = Catalog(model)
        return model

    def check_mergeable(self, names: Sequence[str]) -> None:
        """Raise ``MergeError``, before anything is merged, when one of ``names`` cannot be."""
        for name in names:
            if name in self.prompts:
                entry = self.entries[name]
                raise MergeError(
                    f"{entry.origin or name} is a prompt ({entry.config.peft_type}): it changes input or cache, "
                    "and no weight could hold it.",
                    hint="Use it unmerged; merge other adapters by name: merge_adapter([...]).",
                )
        for layer in self.layers.values():
            if layer.here(tuple(names)):
                sharding.check_merge(layer.site.name, layer.site.module)
            for name in layer.here(tuple(names)):
                for share in layer.bound[name]:
                    share.method.check_mergeable(share.settings, layer.site)
            if layer.site.narrow:
                layer.weight_patches(layer.here(tuple(names)))

    def _check_merge(self, names: tuple[str, ...]) -> None:
        for name, layer in self.layers.items():
            if layer.here(names) and not all(_is_finite(p) for p in layer.merged_parameters(names)):
                raise MergeError(
                    f"Merging {list(names)} gives NaN or infinite values in {name}; nothing was merged.",
                    hint="The weight's dtype may be too small for the change: load the base in bfloat16 or float32.",
                )

    def unload(self, *, keep: bool = False) -> nn.Module:
        """Take every adapter off; the model is as it was before the first one came.

        Args:
            keep: leave weights that were just merged for good as they are.
        """
        if not keep:
            self.unmerge()
        for site_id in list(self.layers):
            self._take_off(site_id)
        for root, saved in self.saved.items():
            self._put(root, saved.original_module)
        self.prompts.clear()
        for module, leaf in self._was_trainable or ():
            getattr(module, leaf).requires_grad_(True)
        for handle in self._watching:
            handle.remove()
        self.layers, self.saved, self.entries, self._watching = {}, {}, {}, []
        self.switch.standing, self._was_trainable = NOTHING, None
        self.scalings.watch(self)
        self.shadows.watch(self)
        if keep and self._replication is not None:  # what was merged into repeated blocks is theirs, and they stay
            self._replication.settle()
            self._replication = None
        self._whole_again()
        return self.model


@dataclass(frozen=True)
class _Made:
    """A layer's share of an adapter that is about to be bound."""

    site: Site
    method: AnyMethod
    settings: Any
    tensors: dict[str, nn.Parameter]
    twin: Site | None


def _is_in_memory(layer: AdaptedLayer) -> bool:
    plain = not isinstance(layer, (PackedLayer, ShardedLayer))
    return plain and all(p.device.type == "cpu" for p in layer.site.module.parameters())


def _segment(value: Any) -> tuple[str, int]:
    """A part of a packed sequence: the adapter's name and the number of its tokens."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[1], int) or value[1] < 1:
        raise AdapterError(
            f"adapter_names holds {value!r}, and elsewhere parts of a packed sequence.",
            hint='Give a name for each row, or (name, tokens) for each part: [("a", 12), ("b", 7)].',
        )
    return value[0], value[1]


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


def _known(config: PeftConfig) -> AnyConfig:
    return config if isinstance(config, PromptConfig) else targeted(config)


def targeted(config: PeftConfig) -> TargetedConfig:
    """The config as one that says which layers it adapts; ``UnsupportedError`` when it does not."""
    if not isinstance(config, TargetedConfig):
        raise UnsupportedError(
            f"{type(config).__name__} does not say which layers to adapt.", hint="Use a method's config: LoraConfig ..."
        )
    return config


def _parameter(tensor: Tensor, device: torch.device, float32: bool, trainable: bool) -> nn.Parameter:
    dtype = torch.float32 if float32 and tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=trainable)


def _tie(method: AnyMethod, config: TargetedConfig, made: Sequence[_Made]) -> None:
    """Let layers use another's tensor where their method shares it."""
    own = [one for one in made if one.method is method]
    for leaf, leaders in method.tied(config, [one.site for one in own]).items():
        for one, leader in zip(own, leaders, strict=True):
            one.tensors[leaf] = own[leader].tensors[leaf]


def _join(
    made: Sequence[_Made], method: AnyMethod, pairs: Sequence[tuple[str, str]], *, new: bool, trainable: bool
) -> list[_Made]:
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
        if settings is not None and (new or _is_again(output, settings, embedding.tensors)):
            found[places[pair[1]]] = replace(output, settings=settings, tensors=dict(embedding.tensors))
        elif trainable:
            raise parted(pair)
    return found


def _is_again(output: _Made, settings: Any, tensors: Mapping[str, Tensor]) -> bool:
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


def _trainable(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    return [(m, leaf) for m in modules for leaf, p in m._parameters.items() if p is not None and p.requires_grad]


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
    if _is_finite(sums):
        return dict(zip(floating, sums.tolist(), strict=True))
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise NonFiniteError(
            f"The adapter {origin} holds NaN or infinite values in {len(bad)} of {len(tensors)} tensors; the first "
            f"is {bad[0]}.",
            hint="Its training diverged or its file is damaged; take an earlier checkpoint.",
        )
    return {}


def _untie(model: nn.Module, alike: bool) -> None:
    """Tie embeddings again that a merge has changed alike; else say in the config that they differ.

    So a saved model keeps both, or the one that both are. ``alike`` says that only rounding can part them.
    """
    config: Any = getattr(model, "config", None)
    ends = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    if config is None or not getattr(config, "tie_word_embeddings", False) or None in ends:
        return
    layers: list[Any] = [end() for end in ends if end is not None]
    weights: list[Any] = [getattr(layer, "weight", None) for layer in layers]
    if not all(isinstance(w, Tensor) for w in weights) or weights[0] is weights[1]:
        return
    if alike or torch.equal(*weights):
        layers[1].weight = weights[0]
    else:
        config.tie_word_embeddings = False
