"""The set of adapters on a model, in which they are looked up, selected, renamed, deleted and unloaded.

``attach.py`` adds to it, ``merge/in_memory.py`` merges the adapters in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.adapter_part import Claim
from veneer.adapters.guard import guarded
from veneer.adapters.known_layouts import Layouts
from veneer.adapters.layer_choices import LayerChoices
from veneer.adapters.prompts import Prompts
from veneer.base_model import sharding
from veneer.configs.base import PeftConfig
from veneer.errors import AdapterError, DuplicateAdapterError, UnknownAdapterError, did_you_mean
from veneer.layers.quantized_merge import QuantizedMerge
from veneer.layers.wrapping import LayerPlacement
from veneer.patches.selection import BASE, DISABLED, NOTHING, Selection, keep_few
from veneer.patches.underway import Concerned


class ModelHook(Protocol):
    """Watches a base model's forward passes while adapters are there that need it."""

    by_place: ClassVar[bool]

    def is_for(self, adapter: Adapter) -> bool:
        """Tell whether an adapter needs it."""

    def refresh(self, adapters: Adapters) -> None:
        """Begin to watch, or stop, as the adapters on the model now need it."""


class Adapters(LayerPlacement):
    """Holds all adapters of one base model.

    Args:
        model: the base model, carrying no adapters (else ``BaseModelError``).
        hooks: watch its passes; none where the model is never called.
    """

    def __init__(self, model: nn.Module, hooks: Sequence[ModelHook] = ()) -> None:
        super().__init__(model)
        self.hooks = hooks
        self.by_name: dict[str, Adapter] = {}
        # True once one of them was to be trained.
        self.trains = False
        # True while one of them acts by the place that an entry has in its row.
        self.asks_for_places = False
        # The outcome of the last merge into quantised weights.
        self.quantized_merge: QuantizedMerge | None = None
        self.active_selection.belong_to(self)
        self.prompts = Prompts(self.active_selection)
        self.layouts = Layouts()
        # The selections of the last batches by their rows, and the set of adapters for which they were checked.
        self._last_rows: tuple[dict[str, Adapter], dict[Any, Selection]] = self.by_name, {}
        # The base's own parameters that wanted gradients before the first adapter came.
        self._was_trainable: list[tuple[nn.Module, str]] | None = None
        # The adapter whose biases are the base's own parameters.
        self._biased_by: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.active_selection.belong_to(self)

    # -- adding --------------------------------------------------------------------------------------------

    @contextmanager
    def replicated(self, config: PeftConfig) -> Iterator[None]:
        """Repeat the blocks that ``config`` names, while an adapter is added; undone if that fails.

        Raises:
            AdapterError: the adapters on the model are for other blocks.
        """
        ranges = [list(pair) for pair in getattr(config, "layer_replication", None) or ()]
        # A new adapter disturbs no call; other blocks disturb all of them.
        with self.active_selection.changing(lambda: () if ranges == self.block_ranges else None):
            if ranges == self.block_ranges:
                yield
                return
            if self.by_name:
                present = self.block_ranges or None
                raise AdapterError(
                    f"The adapter has layer_replication={ranges or None}, and this model's adapters {present}.",
                    hint="Load it on another copy of the base.",
                )
            self.repeat_blocks(ranges)
            try:
                yield
            except BaseException:
                self.repeat_blocks([])
                raise

    def check_new(self, name: str) -> None:
        """Raise ``DuplicateAdapterError`` unless ``name`` can be a new adapter's."""
        if not isinstance(name, str) or not name or name == BASE or any(c in name for c in "./\\"):
            raise DuplicateAdapterError(
                f"{name!r} cannot be an adapter's name.",
                hint=f"A name is a non-empty string without dots and slashes, and not {BASE!r}.",
            )
        if name in self.by_name:
            raise DuplicateAdapterError(
                f"There is an adapter {name!r} on this model already: Adapter with name {name!r} already exists.",
                hint=f"Choose another adapter_name, or delete_adapter({name!r}) first. Present: {self._present()}.",
            )

    def _note_ties(self, adapter: Adapter) -> None:
        """Note on an adapter that it changes some of the layers that share a weight, and not the others."""
        sites = {*(layer.site.name for layer in adapter.layers), *adapter.whole_modules.names}
        for group in self.catalog.tied:
            changed, same = ([name for name in group if (name in sites) is changes] for changes in (True, False))
            if changed and same:
                are, their = ("is", "its") if len(changed) == 1 else ("are", "their")
                adapter.notes.append(
                    f"{' and '.join(changed)} {are} changed and what else shares {their} weight in the base is not "
                    f"({', '.join(same)}); merged, each has its own."
                )

    def _refresh_hooks(self) -> None:
        self.asks_for_places = any(map(self.acts_by_place, self.by_name.values()))
        for hook in self.hooks:
            hook.refresh(self)

    def check_unused(self, name: str) -> None:
        """Raise ``AdapterError`` when another adapter mixes the one of that name."""
        users = [other for other, entry in self.by_name.items() if name in entry.config.experts]
        if users:
            raise AdapterError(
                f"{users[0]!r} mixes {name!r}, which therefore has to stay as it is.",
                hint=f"Delete {users[0]!r} first.",
            )

    def register(self, adapter: Adapter) -> None:
        """Add an adapter whose tensors are on the model; with the first one, freeze the base."""
        self._note_ties(adapter)
        if self._was_trainable is None:
            self._was_trainable = _trainable(self.catalog.modules.values())
            for module, leaf in self._was_trainable:
                getattr(module, leaf).requires_grad_(False)
        # A new dict, for another thread may be going through the old one.
        self.by_name = {**self.by_name, adapter.name: adapter}
        self.layouts.give_to(adapter.wrappers())
        self.trains = self.trains or adapter.trainable
        self._refresh_hooks()
        if adapter.trainable and sharding.is_data_parallel(self.catalog.modules.values()):
            sharding.average_gradients(adapter.parameters())

    def place_biases(self) -> None:
        """Let the base's own biases be those that the first trainable adapter trains, unless some adapter's are."""
        adapter = next((entry for entry in self.by_name.values() if entry.trains_biases), None)
        if adapter is None or self._biased_by is not None or self.is_spread or self.active_selection.in_call:
            return
        with self.changing():
            adapter.layers.place_biases(adapter.name, self.catalog.modules.values())
            self._biased_by = adapter.name

    # -- selecting -----------------------------------------------------------------------------------------

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Make an adapter trainable, or freeze it, active or not; the next choice gives gradients to active ones."""
        adapter = self.get(name)
        is_new, adapter.trainable = trainable and not adapter.trainable, trainable
        self.trains = self.trains or trainable
        adapter.require_grad(trainable)
        adapter.watch()
        if is_new:
            self.place_biases()

    def acts_by_place(self, adapter: Adapter) -> bool:
        """Tell whether an adapter acts by the place that an entry has in its row, whichever adapters a call names."""
        return any(hook.by_place and hook.is_for(adapter) for hook in self.hooks)

    @property
    def active(self) -> list[str]:
        """The selected adapters, in the order in which they apply."""
        return list(self.active_selection.current.names)

    @guarded
    def select(self, names: str | Sequence[str]) -> None:
        """Make ``names`` the default selection. Costs the same for any number of layers and adapters.

        Only where adapters are being trained are their tensors visited: those selected get gradients, the other
        trainable ones none.
        """
        with self.active_selection.choosing:
            selection = self.active_selection.default = self.selection(names)
        if not self.trains:
            return
        used = {*selection.names}.union(*(self.by_name[name].config.experts for name in selection.names))
        for adapter in self.by_name.values():
            if adapter.trainable:
                adapter.require_grad(adapter.name in used)

    def of_layer(self, layer: Any) -> LayerChoices:
        """Return what chooses, enables and freezes adapters on one layer."""
        return LayerChoices(self, layer)

    def selection(self, names: str | Sequence[str]) -> Selection:
        """Return the selection of one adapter or of several at once, checked."""
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            self.get(name)
        if len(set(names)) != len(names):
            raise AdapterError(f"{list(names)} names an adapter twice.", hint="Name each once.")
        holders: dict[Claim, str] = {}
        for name in names if len(names) > 1 else ():
            for claim in self.by_name[name].claims():
                if claim in holders:
                    raise AdapterError(
                        f"{holders[claim]!r} and {name!r} {claim.conflict}; they cannot be active together.",
                        hint=claim.remedy,
                    )
                holders[claim] = name
        return Selection(names)

    def rows(self, names: Iterable[str | tuple[str, int]]) -> Selection:
        """Return the selection of one adapter (or ``"__base__"``) for each row of a batch, checked.

        ``(name, tokens)`` instead of a name stands for so many tokens of a packed sequence. The last batches' are
        kept, and with them where their rows lie, for a decoding loop asks for the same in each step.
        """
        names = list(names)
        counts: tuple[int, ...] | None = None
        if any(not isinstance(name, str) for name in names):
            parts = list(map(_segment, names))
            names, counts = [name for name, _ in parts], tuple(tokens for _, tokens in parts)
        rows = tuple(map(str, names))
        if torch.compiler.is_compiling():
            self._check_rows(rows)
            return Selection(rows=rows, counts=counts)
        present = self.by_name
        if self._last_rows[0] is not present:
            self._last_rows = present, {}
        last = self._last_rows[1]
        selection = last.get((rows, counts))
        if selection is None:
            self._check_rows(rows)
            selection = Selection(rows=rows, counts=counts)
            keep_few(last, (rows, counts), selection)
        return selection

    def _check_rows(self, rows: Sequence[str]) -> None:
        absent = sorted(set(rows) - {BASE} - self.by_name.keys())
        if absent:
            raise UnknownAdapterError(
                f"There is no adapter {absent[0]!r} on this model. "
                f"Trying to infer with non-existing adapter(s): {', '.join(absent)}.",
                hint=did_you_mean(absent[0], self.by_name) + f"Present: {self._present()}.",
            )
        self.prompts.check_rows(rows)

    def using(self, selection: Selection) -> AbstractContextManager[None]:
        """Use ``selection`` inside a ``with`` block, in this thread or task only."""
        return self.active_selection.using(selection)

    def disabled(self) -> AbstractContextManager[None]:
        """Use the base model alone inside a ``with`` block, in this thread or task only."""
        return self.active_selection.using(DISABLED)

    def get(self, name: str) -> Adapter:
        """Return an adapter by name, or raise ``UnknownAdapterError``."""
        if name not in self.by_name:
            raise UnknownAdapterError(
                f"There is no adapter {name!r} on this model: Adapter {name} does not exist.",
                hint=did_you_mean(str(name), self.by_name) + f"Present: {self._present()}.",
            )
        return self.by_name[name]

    def _present(self) -> str:
        return ", ".join(map(repr, self.by_name)) or "none"

    # -- tensors -------------------------------------------------------------------------------------------

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return every parameter of an adapter that is trained."""
        return self.get(name).parameters()

    def named_tensors(self, name: str) -> list[tuple[str, Tensor]]:
        """Return the checkpoint key of each tensor of an adapter that is saved, and the tensor."""
        return self.get(name).named_tensors()

    # -- changing the set ----------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        """Remove an adapter. If it alone was selected, the first that remains takes its place."""
        with self.active_selection.changing(lambda: self.concerned(name)):
            self._delete(name)

    @guarded
    def _delete(self, name: str) -> None:
        adapter = self.get(name)
        self.check_unused(name)
        for part in adapter.parts:
            part.remove(adapter, self)
        self.by_name = {other: entry for other, entry in self.by_name.items() if other != name}
        self._biased_by = None if name == self._biased_by else self._biased_by
        active = self.active_selection.default.names
        if name in active:
            self.select([other for other in active if other != name] or list(self.by_name)[:1])
        else:
            self._rename_selected({name: None})
        self.layouts.forget(name)
        self._refresh_hooks()

    def concerned(self, name: str) -> Concerned:
        """Return the adapters whose calls a change of one disturbs: its own, or all where it is merged."""
        entry = self.by_name.get(name)
        others = entry is not None and (name == self._biased_by or entry.layers.merged(name))
        return None if others else (name,)

    def changing(self, concerned: Concerned = None) -> AbstractContextManager[None]:
        """Change adapters in a ``with`` block, while no call that uses ``concerned`` is under way.

        Args:
            concerned: adapters' names; ``None`` for every call.

        Raises:
            AdapterError: this is asked for inside such a call.
        """
        return self.active_selection.changing(lambda: concerned)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; it keeps its place in the order."""
        with self.active_selection.changing(lambda: self.concerned(old)):
            self._rename(old, new)

    @guarded
    def _rename(self, old: str, new: str) -> None:
        adapter = self.get(old)
        if new == old:
            return
        self.check_new(new)
        self.check_unused(old)
        for part in adapter.parts:
            part.rename(old, new)
        adapter.name = new
        self._biased_by = new if old == self._biased_by else self._biased_by
        with self.active_selection.choosing:
            self.by_name = {entry.name: entry for entry in self.by_name.values()}
            self._rename_selected({old: new})
        self.layouts.ready.clear()

    def _rename_selected(self, names: Mapping[str, str | None]) -> None:
        """Give adapters other names in the default selection; ``None`` leaves one out."""
        self.active_selection.default = self.active_selection.default.renamed(names)

    # -- taking off ----------------------------------------------------------------------------------------

    def unmerge(self) -> None:
        """Take every merged adapter out again: the base weights get their original bytes back."""
        with self.changing():
            for layer in self.adapted_layers:
                layer.unmerge()

    def unload(self, *, keep: bool = False) -> nn.Module:
        """Take every adapter off, so that the model is as it was before the first one came.

        Args:
            keep: leave weights as they are, which were just merged for good.
        """
        with self.changing():
            return self._unload(keep)

    @guarded
    def _unload(self, keep: bool) -> nn.Module:
        if not keep:
            self.unmerge()
        for site_id in list(self.layers):
            self.remove_wrapper(site_id)
        for root in list(self.module_copies):
            self.remove_copies(root)
        for holder in self.beside.values():
            holder._modules.clear()
        self.drop_beside()
        self.prompts.clear()
        for module, leaf in self._was_trainable or ():
            getattr(module, leaf).requires_grad_(True)
        self.by_name, self._biased_by = {}, None
        self.layouts.ready.clear()
        self.active_selection.default, self._was_trainable = NOTHING, None
        self._refresh_hooks()
        if keep:
            self.settle_blocks()
        self.repeat_blocks([])
        return self.model


def _segment(value: Any) -> tuple[str, int]:
    """Return a part of a packed sequence, checked: the adapter's name and the number of its tokens."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[1], int) or value[1] < 1:
        raise AdapterError(
            f"adapter_names holds {value!r}, and elsewhere parts of a packed sequence.",
            hint='Give a name for each row, or (name, tokens) for each part: [("a", 12), ("b", 7)].',
        )
    return value[0], value[1]


def _trainable(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    return [(m, leaf) for m in modules for leaf, p in m._parameters.items() if p is not None and p.requires_grad]
