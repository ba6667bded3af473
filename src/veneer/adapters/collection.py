"""The set of adapters on a model: look up, select, rename, delete, take off again.

``adding.py`` adds to it, ``merging/in_memory.py`` merges what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.guard import guarded
from veneer.adapters.known_layouts import Layouts
from veneer.adapters.prompt_sizes import complete
from veneer.adapters.prompts import Prompts
from veneer.base_model import sharding
from veneer.base_model.catalog import Catalog
from veneer.base_model.repeated_blocks import Replication
from veneer.configs.base import AnyConfig, PeftConfig, PromptConfig, TargetedConfig, as_any_config
from veneer.errors import AdapterError, DuplicateAdapterError, UnknownAdapterError, did_you_mean
from veneer.files.tensor_keys import SHARED_PREFIX, encode
from veneer.layers.quantized_merge import QuantizedMerge
from veneer.layers.wrapping import LayerPlacement
from veneer.methods import AnyMethod, method_of, prompt_of
from veneer.methods.base.prompt_method import AnyPrompt
from veneer.patches.selection import BASE, NOTHING, Selection
from veneer.patches.underway import Concerned
from veneer.patches.watched_parameters import leave_alone


class ModelHook(Protocol):
    """Something that watches a base model's forward passes while adapters are there that need it."""

    @property
    def acts_by_place(self) -> bool:
        """Whether an adapter acts by the place that an entry has in its row, whichever adapters a call names."""
        ...

    def refresh(self, adapters: Adapters) -> None:
        """Begin to watch, or stop, as the adapters that are there now need it."""
        ...


class Adapters(LayerPlacement):
    """All adapters of one base model.

    Args:
        model: the base model, carrying no adapters (else ``BaseModelError``).
        hooks: what watches its passes; none where the model is never called.
    """

    def __init__(self, model: nn.Module, hooks: Sequence[ModelHook] = ()) -> None:
        super().__init__(model)
        self.hooks = hooks
        self.by_name: dict[str, Adapter] = {}
        # Whether one of them is, or was, to be trained.
        self.trains = False
        # What the last merge into quantised weights lost.
        self.quantized_merge: QuantizedMerge | None = None
        self.prompts = Prompts(self.switch)
        self.layouts = Layouts()
        # Where the base's own parameters wanted gradients, before the first adapter came.
        self._was_trainable: list[tuple[nn.Module, str]] | None = None
        # Which blocks the model has several times.
        self._replication: Replication | None = None

    # -- adding --------------------------------------------------------------------------------------------

    @contextmanager
    def replicated(self, config: PeftConfig) -> Iterator[None]:
        """Let the model have the blocks that ``config`` wants, while an adapter is added; undone if that fails.

        Raises:
            AdapterError: the adapters that are there are for other blocks.
        """
        wanted = [list(pair) for pair in getattr(config, "layer_replication", None) or ()]
        # A layer may be given a new adapter while others are used; its place is another matter.
        with self.switch.changing(lambda: () if wanted == self._ranges else None), self._with_blocks(wanted):
            yield

    @property
    def _ranges(self) -> list[list[int]]:
        return [] if self._replication is None else self._replication.ranges

    @contextmanager
    def _with_blocks(self, wanted: list[list[int]]) -> Iterator[None]:
        present = self._ranges
        if wanted == present:
            yield
            return
        if self.by_name:
            raise AdapterError(
                f"The adapter has layer_replication={wanted or None}, and this model's adapters {present or None}.",
                hint="Load it on another copy of the base.",
            )
        self._undo_replication()
        self._replication = Replication(self.model, wanted) if wanted else None
        self.catalog = Catalog(self.model)
        try:
            yield
        except BaseException:
            self._undo_replication()
            raise

    def _undo_replication(self) -> None:
        """Give the model the blocks that it came with."""
        if self._replication is not None:
            self._replication.undo()
            self._replication = None
            self.catalog = Catalog(self.model)

    def method_for(self, config: PeftConfig) -> AnyMethod | AnyPrompt:
        """The method of a config; that of a prompt is completed with the model's sizes."""
        if not isinstance(config, PromptConfig):
            return method_of(as_any_config(config))
        method = prompt_of(config)
        complete(config, method, self.model)
        return method

    def note_zero_layers(self, adapter: Adapter, sure: Collection[str] = ()) -> None:
        """Find the layers in which an adapter changes nothing; those in ``sure`` need not be looked at."""
        adapter.zero_layers = [
            name
            for name in adapter.layers
            if name not in sure and not any(patch.changes() for patch in self.layers[name].patches([adapter.name]))
        ]

    def check_new(self, name: str) -> None:
        """Raise ``DuplicateAdapterError`` unless ``name`` can be a new adapter's."""
        if not isinstance(name, str) or not name or name == BASE or any(c in name for c in "./\\"):
            raise DuplicateAdapterError(
                f"{name!r} cannot be an adapter's name.",
                hint=f"A name is a non-empty string without dots and slashes, and not {BASE!r}.",
            )
        if name in self.by_name:
            raise DuplicateAdapterError(
                f"There is an adapter {name!r} on this model already.",
                hint=f"Choose another adapter_name, or delete_adapter({name!r}) first. Present: {self._present()}.",
            )

    def _note_ties(self, adapter: Adapter) -> None:
        """Tell of an adapter that changes some of the layers that share a weight, and not the others."""
        touched = {*(self.layers[site].site.name for site in adapter.layers), *adapter.whole_modules}
        for group in self.catalog.tied:
            changed, same = ([name for name in group if (name in touched) is wanted] for wanted in (True, False))
            if changed and same:
                are, their = ("is", "its") if len(changed) == 1 else ("are", "their")
                adapter.notes.append(
                    f"{' and '.join(changed)} {are} changed and what else shares {their} weight in the base is not "
                    f"({', '.join(same)}); merged, each has its own."
                )

    def _refresh_hooks(self) -> None:
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
        self._note_ties(adapter)
        if self._was_trainable is None:
            self._was_trainable = _trainable(self.catalog.modules.values())
            for module, leaf in self._was_trainable:
                getattr(module, leaf).requires_grad_(False)
        # Another thread may be going through them.
        self.by_name = {**self.by_name, adapter.name: adapter}
        self.layouts.ready.clear()
        self.trains = self.trains or adapter.trainable
        self._refresh_hooks()
        if adapter.trainable and sharding.is_data_parallel(self.catalog.modules.values()):
            sharding.average_gradients(self.parameters(adapter.name))

    # -- selecting -----------------------------------------------------------------------------------------

    @property
    def asks_for_places(self) -> bool:
        """Whether an adapter acts by the place that an entry has in its row, whichever adapters a call names."""
        return any(hook.acts_by_place for hook in self.hooks)

    @property
    def active(self) -> list[str]:
        """The selected adapters, in the order in which they apply."""
        return list(self.switch.selection.names)

    @guarded
    def select(self, names: str | Sequence[str]) -> None:
        """Make ``names`` the standing selection. Costs the same for any number of layers and adapters.

        Only where adapters are being trained are their tensors visited: those selected get gradients, the other
        trainable ones none.
        """
        with self.switch.choosing:
            wanted = self.switch.default = self.selection(names)
        if not self.trains:
            return
        used = {*wanted.names, *(expert for name in wanted.names for expert in self.by_name[name].config.experts)}
        for adapter in self.by_name.values():
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
        alone = [name for name in wanted if self.by_name[name].exclusive]
        if len(alone) > 1:
            raise AdapterError(
                f"{alone[0]!r} and {alone[1]!r} each put another weight in the base's place (LoftQ); they cannot be "
                "active together.",
                hint="Select one of them, or load them on a base that is quantised.",
            )
        holders: dict[str, str] = {}
        for name in wanted:
            for root in self.by_name[name].whole_modules:
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

    def using(self, selection: Selection) -> AbstractContextManager[None]:
        """Use ``selection`` inside a ``with`` block, in this thread or task only."""
        return self.switch.using(selection)

    def disabled(self) -> AbstractContextManager[None]:
        """The base model alone inside a ``with`` block, in this thread or task only."""
        return self.switch.using(NOTHING)

    def get(self, name: str) -> Adapter:
        """An adapter by name, or ``UnknownAdapterError``."""
        if name not in self.by_name:
            raise UnknownAdapterError(
                f"There is no adapter {name!r} on this model.",
                hint=did_you_mean(str(name), self.by_name) + f"Present: {self._present()}.",
            )
        return self.by_name[name]

    def require_grad(self, adapter: Adapter, required: bool) -> None:
        """Turn the gradients of an adapter's tensors on or off."""
        for parameter in self.parameters(adapter.name):
            parameter.requires_grad_(required)

    def watch(self, adapter: Adapter) -> None:
        """Watch an adapter's tensors where it is not to be trained, and only then."""
        if adapter.trainable:
            leave_alone(self.parameters(adapter.name))
        for module in () if adapter.trainable else adapter.layers:
            self.layers[module].watch()

    def _present(self) -> str:
        return ", ".join(map(repr, self.by_name)) or "none"

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
        trained = [root for root in adapter.whole_modules if root not in adapter.vocabulary_rows]
        found = [p for root in trained for p in self.copy_of(root, adapter.name).parameters()]
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
        prefix = self.method_for(adapter.config).prefix
        for root in adapter.whole_modules:
            own = self.copy_of(root, name).state_dict(keep_vars=True)
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
        whole = [tensor for root in adapter.whole_modules for tensor in self.copy_of(root, name).state_dict().values()]
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

    def copy_of(self, root: str, name: str) -> nn.Module:
        """An adapter's copy of a module that it brings whole."""
        own: nn.Module = self.module_copies[root].copies[name]
        return own

    # -- changing the set ----------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        """Remove an adapter. If it was selected, the rest of the selection stays (the base alone if none)."""
        with self.switch.changing(lambda: self.concerned(name)):
            self._delete(name)

    @guarded
    def _delete(self, name: str) -> None:
        adapter = self.get(name)
        self.check_unused(name)
        for module in adapter.layers:
            self._leave(module, name)
        if name in self.prompts:
            self.prompts.remove(name)
        for root in adapter.whole_modules:
            self.module_copies[root].remove(name)
            if not self.module_copies[root].copies:
                self.place(root, self.module_copies.pop(root).original_module)
        with self.switch.choosing:
            self.by_name = {other: entry for other, entry in self.by_name.items() if other != name}
            kept = self.switch.default.names
            self.switch.default = Selection(tuple(other for other in kept if other != name))
        self.layouts.ready.clear()
        self._refresh_hooks()

    def concerned(self, name: str) -> Concerned:
        """Whose calls a change of an adapter disturbs: its own, or all where it is in the base's weights."""
        entry = self.by_name.get(name)
        layers = [] if entry is None else entry.layers
        return None if any(name in self.layers[layer].merged for layer in layers) else (name,)

    def changing(self, concerned: Concerned = None) -> AbstractContextManager[None]:
        """Change adapters in a ``with`` block, while no call is under way that ``concerned`` are used in.

        Args:
            concerned: adapters' names; ``None`` is every call.

        Raises:
            AdapterError: this is asked for inside such a call.
        """
        return self.switch.changing(lambda: concerned)

    def _leave(self, module: str, name: str) -> None:
        layer = self.layers[module]
        if name in layer.merged:
            layer.merge(tuple(other for other in layer.merged if other != name))
        layer.unbind(name)
        if not layer.bound:
            self.remove_wrapper(module)

    def leave_layers(self, adapter: Adapter, modules: Iterable[str]) -> None:
        """Take an adapter off some of its layers."""
        for module in modules:
            self._leave(module, adapter.name)
            adapter.layers.remove(module)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; it keeps its place in the order."""
        with self.switch.changing(lambda: self.concerned(old)):
            self._rename(old, new)

    @guarded
    def _rename(self, old: str, new: str) -> None:
        adapter = self.get(old)
        if new == old:
            return
        self.check_new(new)
        self.check_unused(old)
        for module in adapter.layers:
            self.layers[module].rename(old, new)
        if old in self.prompts:
            self.prompts.rename(old, new)
        for root in adapter.whole_modules:
            self.module_copies[root].rename(old, new)
        adapter.name = new
        with self.switch.choosing:
            self.by_name = {entry.name: entry for entry in self.by_name.values()}
            names = self.switch.default.names
            self.switch.default = Selection(tuple(new if name == old else name for name in names))
        self.layouts.ready.clear()

    # -- taking off ----------------------------------------------------------------------------------------

    def unmerge(self) -> None:
        """Take every merged adapter out again: the base weights get their original bytes back."""
        with self.changing():
            for layer in self.layers.values():
                layer.unmerge()

    def unload(self, *, keep: bool = False) -> nn.Module:
        """Take every adapter off; the model is as it was before the first one came.

        Args:
            keep: leave weights that were just merged for good as they are.
        """
        with self.changing():
            return self._unload(keep)

    @guarded
    def _unload(self, keep: bool) -> nn.Module:
        if not keep:
            self.unmerge()
        for site_id in list(self.layers):
            self.remove_wrapper(site_id)
        for root, saved in self.module_copies.items():
            self.place(root, saved.original_module)
        self.prompts.clear()
        for module, leaf in self._was_trainable or ():
            getattr(module, leaf).requires_grad_(True)
        self.layers, self.module_copies, self.by_name = {}, {}, {}
        self.layouts.ready.clear()
        self.switch.default, self._was_trainable = NOTHING, None
        self._refresh_hooks()
        if keep and self._replication is not None:  # what was merged into repeated blocks is theirs, and they stay
            self._replication.settle()
            self._replication = None
        self._undo_replication()
        return self.model


def _segment(value: Any) -> tuple[str, int]:
    """A part of a packed sequence: the adapter's name and the number of its tokens."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[1], int) or value[1] < 1:
        raise AdapterError(
            f"adapter_names holds {value!r}, and elsewhere parts of a packed sequence.",
            hint='Give a name for each row, or (name, tokens) for each part: [("a", 12), ("b", 7)].',
        )
    return value[0], value[1]


def _trainable(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    return [(m, leaf) for m in modules for leaf, p in m._parameters.items() if p is not None and p.requires_grad]
