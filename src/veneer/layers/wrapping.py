"""Puts wrappers in the places of a base model's layers, and takes them off again.

The base model is edited in one way only: an adapted layer is put in the place of its base layer, which it holds.
Taking it out again leaves the model as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from veneer.base_model import sharding
from veneer.base_model.catalog import Catalog
from veneer.base_model.repeated_blocks import Replication
from veneer.base_model.sites.attention import AttentionSite
from veneer.base_model.sites.block import BlockSite
from veneer.base_model.sites.quantized.packed import PackedSite
from veneer.base_model.sites.site import Site
from veneer.errors import BaseModelError, BindError, UnsupportedError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.adapter_shares import LayerAdapters, PlainBase
from veneer.layers.any_names import Copies
from veneer.layers.attention_layer import AdaptedAttention
from veneer.layers.block_layer import AdaptedBlock
from veneer.layers.merge_only import MergeOnlyLayer
from veneer.layers.module_copies import ModuleCopies
from veneer.layers.parameter_layer import AdaptedParameter
from veneer.layers.quantized_layer import PackedLayer
from veneer.layers.sharded_layer import ShardedLayer
from veneer.methods.base.method import BaseLayer
from veneer.patches.active_selection import ActiveSelection


def check_untouched(model: nn.Module) -> None:
    """Raise ``BaseModelError`` when a model carries adapters already, Veneer's or peft's."""
    for name, module in model.named_modules():
        if isinstance(module, (AdaptedLayer, ModuleCopies)):
            raise BaseModelError(
                f"The base model already carries adapters (first at {name}); wrapping it twice would stack them.",
                hint="Add another with load_adapter(...) or add_adapter(...) on the model that has them, or "
                "call its unload() first.",
            )
        if type(module).__module__.startswith("peft.tuners"):
            raise BaseModelError(
                f"The base model carries an adapter of peft's already (first at {name}).",
                hint="Take it off with peft's unload(), or load the base again; transformers' delete_adapter(...) "
                "leaves peft's layers. veneer.load(path) loads an adapter with its base; `import veneer.as_peft` first "
                "lets transformers use Veneer in the place of peft.",
            )


def take_off(model: nn.Module) -> None:
    """Take all of Veneer's wrappers off a model, whose set of adapters may be gone; merged ones are unmerged."""
    for name in [name for name, module in model._modules.items() if isinstance(module, Copies)]:
        del model._modules[name]
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):
            while isinstance(module, AdaptedLayer):
                module.unmerge()
                module.drop_copies()
                module.take_out_bias()
                module = module.base_layer
            parent._modules[name] = module.original_module if isinstance(module, ModuleCopies) else module


class LayerPlacement:
    """The wrappers that stand in the places of a base model's layers.

    Attributes:
        model: the base model.
        catalog: its own modules.
        active_selection: the selection that all of them share.
        layers: a site's id -> the adapters on it, and, unless they are merged while loading, the layer in its place.
        module_copies: a module's name -> what holds the copies of it that adapters bring.
        beside: a name in the base model -> what holds the modules there that adapters compute with beside its own.

    Raises:
        BaseModelError: the model carries adapters already.
    """

    def __init__(self, model: nn.Module) -> None:
        check_untouched(model)
        self.model = model
        self.catalog = Catalog(model)
        self.active_selection = ActiveSelection()
        self.layers: dict[str, LayerAdapters] = {}
        self.module_copies: dict[str, ModuleCopies] = {}
        self.beside: dict[str, Copies] = {}
        self._replication: Replication | None = None
        # False while merging on load: layers are bound but not wrapped.
        self._wraps = True
        # Weight dtypes whose memory a merge on load may overwrite: those that nobody else holds.
        self._overwritten: Collection[torch.dtype] = ()

    @property
    def block_ranges(self) -> list[list[int]]:
        """The ranges of blocks that the model is made of; empty for its own blocks."""
        return [] if self._replication is None else self._replication.ranges

    def repeat_blocks(self, ranges: list[list[int]]) -> None:
        """Make the model of the blocks of ``ranges``; of its own blocks where there are none."""
        if ranges == self.block_ranges:
            return
        if self._replication is not None:
            self._replication.undo()
            self._replication = None
        if ranges:
            self._replication = Replication(self.model, ranges)
        self.catalog = Catalog(self.model)

    def note_new_modules(self) -> None:
        """Take in the modules that others have put into the base model since the first adapter came."""
        modules = dict(_base_modules(self.model, "", set()))
        if modules != self.catalog.modules:
            self.catalog = Catalog(self.model, modules=modules)

    def settle_blocks(self) -> None:
        """Give repeated blocks weights of their own for good, because different ones were merged into them."""
        if self._replication is not None:
            self._replication.settle()
            self._replication = None

    @contextmanager
    def merging_on_load(self, overwritten: Collection[torch.dtype] = ()) -> Iterator[None]:
        """Wrap nothing inside the ``with`` block, in which adapters are loaded and merged for good.

        Packed layers are wrapped all the same, for their wrapper does the merge, and so are those that are spread over
        processes, which refuse it.

        Args:
            overwritten: the dtypes in which nobody else holds the base's weights, so that merged ones may take their
                memory.
        """
        self._wraps, self._overwritten = False, overwritten
        try:
            yield
        finally:
            self._wraps = True

    def wrap(self, site: Site) -> LayerAdapters:
        """Return the adapted layer of a site, put in its place if none was."""
        if self._layer_at(site) is None:
            there = self.standing_at(site.name)
            self.layers[site.id] = layer = self._wrapped(site, there if isinstance(there, AdaptedLayer) else None)
            if isinstance(layer, AdaptedLayer):
                layer.behind_backbone = self.catalog.is_behind_backbone(site.name)
                self.place(site.name, layer)
        return self.layers[site.id]

    def _layer_at(self, site: Site) -> LayerAdapters | None:
        """Return the adapted layer of a site; where its bias alone was adapted so far, its weight can be now."""
        layer = self.layers.get(site.id)
        if layer is not None and layer.site.shift_only:
            layer.site = site
        return layer

    @property
    def adapted_layers(self) -> list[AdaptedLayer]:
        """The wrappers that stand in the model: all but layers that are merged while loading."""
        return [layer for layer in self.layers.values() if isinstance(layer, AdaptedLayer)]

    def _wrapped(self, site: Site, there: AdaptedLayer | None) -> LayerAdapters:
        if isinstance(site, PackedSite):
            return PackedLayer(site, self.active_selection)
        if sharding.is_tensor_parallel(site.module):
            return ShardedLayer(site, self.active_selection, there)
        if not self._wraps:
            overwrite = site.stored.dtype in self._overwritten and self.catalog.is_alone(site.stored)
            return MergeOnlyLayer(site, overwrite)
        if isinstance(site, AttentionSite):
            return AdaptedAttention(site, self.active_selection)
        if isinstance(site, BlockSite):
            return AdaptedBlock(site, self.active_selection)
        kind = AdaptedParameter if site.inside_layer else AdaptedLayer
        return kind(site, self.active_selection, there)

    @property
    def is_spread(self) -> bool:
        """True for a base that is spread over processes."""
        return sharding.sharded_parameter(self.catalog.modules.values()) is not None

    def remove_wrapper(self, site_id: str) -> None:
        """Remove a wrapper; a wrapper around it then wraps what it wrapped."""
        layer = self.layers.pop(site_id)
        if not isinstance(layer, AdaptedLayer):  # it never stood in the model
            return
        layer.drop_copies()
        layer.take_out_bias()
        outer = self.standing_at(layer.site.name)
        if outer is layer:
            self.place(layer.site.name, layer.base_layer)
            return
        while isinstance(outer, AdaptedLayer) and outer.base_layer is not layer:
            outer = outer.base_layer
        if isinstance(outer, AdaptedLayer):
            outer._modules["base_layer"] = layer.base_layer

    def place_copies(self, root: str) -> ModuleCopies:
        """Return the wrapper that holds the copies of a module, put in its place if none was."""
        if root not in self.module_copies:
            self.module_copies[root] = copies = ModuleCopies(self.catalog.modules[root], self.active_selection)
            copies.behind_backbone = self.catalog.is_behind_backbone(root)
            if self._wraps:
                self.place(root, self.module_copies[root])
        return self.module_copies[root]

    def remove_copies(self, root: str) -> None:
        """Put a module back in the place of the wrapper that held its copies."""
        self.place(root, self.module_copies.pop(root).original_module)

    def hold_beside(self, kind: str) -> Copies:
        """Return what holds adapters' modules in the base model under the name ``kind``."""
        if kind not in self.beside:
            self.beside[kind] = self.model._modules[kind] = Copies()
        return self.beside[kind]

    def drop_beside(self) -> None:
        """Take what holds such modules off the base model where no adapter has one any more."""
        if not any(map(len, self.beside.values())):
            for kind in self.beside:
                del self.model._modules[kind]
            self.beside = {}

    def standing_at(self, name: str) -> nn.Module:
        """Return the module that stands at a name now: the base's own, or a wrapper."""
        parent, _, child = name.rpartition(".")
        module = self.catalog.modules[parent]._modules[child]
        assert module is not None
        return module

    def place(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of that name."""
        parent, _, child = name.rpartition(".")
        self.catalog.modules[parent]._modules[child] = module

    def base(self, site: Site) -> BaseLayer:
        """Return a base layer as it was before any adapter, for a method to start from."""
        return self._layer_at(site) or PlainBase(site)

    def check_spread(self, sites: list[Site], roots: list[str]) -> None:
        """Raise where a base that is spread over processes cannot be adapted so."""
        for site in sites:
            sharding.check_site(site)
            present = self.layers.get(site.id)
            if present is not None and present.site.shift_only and isinstance(site, PackedSite):
                raise UnsupportedError(
                    f"{site.name}: {next(iter(present.bound))!r} trains the bias of this packed layer, and another "
                    "adapter is to change its weight.",
                    hint="Load that other adapter first.",
                )
        for root in roots:
            sharding.check_copy(root, self.catalog.modules[root])

    def check_places(self, sites: list[str], roots: list[str]) -> None:
        """Raise ``BindError`` where one adapter's whole module would hold another's adapted layer, or the reverse."""
        for outer, inner in ((self.module_copies, sites), (roots, list(self.layers))):
            for name in inner:
                root = next((r for r in outer if name == r or name.startswith(r + ".")), None)
                if root is not None:
                    raise BindError(
                        f"{root} is saved whole by one adapter and {name} adapted by another; one model cannot hold "
                        "both.",
                        hint="Load them on two copies of the base, or delete the first.",
                    )


def _base_modules(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Return the base's own modules by name, as ``named_modules`` does for a model without adapted layers."""
    if isinstance(module, AdaptedLayer):
        module = module.get_base_layer()
    elif isinstance(module, ModuleCopies):
        module = module.original_module
    if module in seen or isinstance(module, Copies):
        return
    seen.add(module)
    yield name, module
    for child, below in module._modules.items():
        if below is not None:
            yield from _base_modules(below, f"{name}.{child}" if name else child, seen)
