"""The selection of a model: its default one, or one made for a single call or block.

The layers of a model share one :class:`ActiveSelection`, so that selecting is one assignment however many layers there
are. A selection for a call is a part of its state (:class:`ForwardCall`), which threads and async tasks do not share.
Compiled code cannot read that, and is guarded by a copy that belongs to the thread instead. Each call of the model
(``adapters/call.py``) makes what it finds selected its own, so that no other thread changes it on the way.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Token
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.errors import BaseModelError
from veneer.patches.cast_cache import CastCache
from veneer.patches.forward_call import ForwardCall, begin, current, end
from veneer.patches.selection import DISABLED, NOTHING, LayerChoice, Selection
from veneer.patches.underway import Concerned, Underway


class _Thread(threading.local):
    """Holds the selection that one thread has made for the calls it makes now."""

    def __init__(self) -> None:
        # Set for each thread, for compiled code is guarded on an instance's attributes, and not on a class's.
        self.chosen: Selection | None = None


class ActiveSelection:
    """Holds what is selected on one model; its layers share it.

    Attributes:
        default: the selection of calls and blocks that make none of their own.
        enabled: False makes the default one empty.
        blocks_without: how many blocks are open that make it empty in all threads.
        choosing: the lock that is held while the default one, or the set of adapters, changes.
        underway: the calls of the model, and the changes that wait for them.
        casts: inputs of layers, cast to the dtype of their adapters; layers share them.
        layer_states: a token that is replaced each time a layer comes into another state.
    """

    default: Selection
    enabled: bool
    choosing: Any
    # The names that a layer was asked to select last, and the default selection that came of them.
    _asked: tuple[Sequence[str], Selection]

    def __init__(self) -> None:
        self.__setstate__({"default": NOTHING, "enabled": True})

    @property
    def current(self) -> Selection:
        """The selection of a forward pass in this context."""
        chosen = self._thread.chosen if torch.compiler.is_compiling() else self._in_context()
        if chosen is not None:
            return chosen
        return self.default if self.enabled and not self.blocks_without else DISABLED

    @property
    def is_enabled(self) -> bool:
        """False while adapters are disabled in this context."""
        return not self.current.disabled

    @property
    def asked(self) -> Sequence[str]:
        """The names that were asked for, disabled or not, those of adapters that are not on the model included."""
        current = self.current
        return self.asked_of(self.default if current.disabled else current)

    def asked_of(self, selection: Selection) -> Sequence[str]:
        """Return the names that a selection was made of, those of adapters that are not on the model included."""
        names, made = self._asked
        return names if made is selection else selection.names

    def enable(self, enabled: bool) -> None:
        """Run the adapters in all layers from now on, or the base alone."""
        with self.choosing:
            self.enabled = enabled
            if self.default.by_layer:
                choices = self.default.by_layer.items()
                self.set_by_layer({layer: replace(choice, enabled=enabled) for layer, choice in choices})

    def set_by_layer(self, by_layer: Mapping[object, LayerChoice]) -> None:
        """Give layers other adapters than the model in the default selection."""
        asked = self.asked_of(self.default)
        self.default = replace(self.default, by_layer=by_layer)
        self.note_asked(asked)

    def note_asked(self, names: Sequence[str]) -> None:
        """Note the names that the default selection was made of."""
        self._asked = names, self.default

    def _in_context(self) -> Selection | None:
        """Return the selection of the call or block that this context is inside of, if it is."""
        state: ForwardCall | None = current()
        while state is not None:
            if state.owner is self:
                return state.selection
            state = state.outer
        return None

    @property
    def in_call(self) -> bool:
        """True while the model is called, or computes something again on the way back."""
        return torch.compiler.is_compiling() or bool(self.calls()) or torch._C._current_graph_task_id() != -1

    def calls(self) -> list[object]:
        """Return the calls of the model that this context is, or was, inside of."""
        calls: list[object] = []
        state: ForwardCall | None = current()
        while state is not None:
            if state.owner is self and state.call is not None:
                calls.append(state.call)
            state = state.outer
        return calls

    def push(self, selection: Selection, call: object = None, prompt: Tensor | None = None) -> Token[ForwardCall]:
        """Use ``selection`` from now on in this thread or task, until :meth:`pop` is given what this returns."""
        token = begin(self, selection, call, prompt)
        self._thread.chosen = selection
        return token

    def pop(self, token: Token[ForwardCall]) -> None:
        """Use again what was used before :meth:`push`."""
        end(token)
        # Not what it was before: with tasks that take turns, that may be another task's.
        self._thread.chosen = self._in_context()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in a thread that has another's context, so that compiled code sees the selection too."""
        chosen = self._in_context()
        if chosen is None:
            return function()
        with self.using(chosen):
            return function()

    def changing(self, concerned: Callable[[], Concerned]) -> AbstractContextManager[None]:
        """Change adapters in a ``with`` block: see :meth:`Underway.change`."""
        return self.underway.change(concerned, self.calls())

    @contextmanager
    def using(self, selection: Selection) -> Iterator[None]:
        """Use ``selection`` inside the block, in this thread or task only.

        A compiled model sees the selection of its thread, whichever task made it: do not await inside the block.
        """
        if torch.compiler.is_compiling():
            before, self._thread.chosen = self._thread.chosen, selection
            try:
                yield
            finally:
                self._thread.chosen = before
            return
        token = self.push(selection)
        try:
            yield
        finally:
            self.pop(token)

    @contextmanager
    def disabled_everywhere(self) -> Iterator[None]:
        """Use the base alone inside the block, in other threads too but for those that have made a selection."""
        with self.choosing:
            self.blocks_without += 1
        try:
            with self.using(DISABLED):
                yield
        finally:
            with self.choosing:
                self.blocks_without -= 1

    @property
    def adapters(self) -> Any:
        """The set of adapters that is selected from, for layers of the model.

        Raises:
            BaseModelError: it is gone.
        """
        adapters = None if self._adapters is None else self._adapters()
        if adapters is None:
            raise BaseModelError(
                "The PeftModel that this layer belongs to is gone.", hint="Keep it as long as its layers are used."
            )
        return adapters

    def belong_to(self, adapters: Any) -> None:
        """Let layers find the set of adapters; by a weak reference, so that a dropped model is freed at once."""
        self._adapters: weakref.ref[Any] | None = weakref.ref(adapters)

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "enabled": self.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.default = state["default"]
        self.enabled = state["enabled"]
        self.blocks_without = 0
        self._asked = (), NOTHING
        # The set of adapters makes it known, also to a copy of this.
        self._adapters = None
        self.choosing = threading.RLock()
        self.underway = Underway()
        # A copy for compiled code, which cannot read the context variable.
        self._thread = _Thread()
        self.casts = CastCache()
        self.layer_states = object()

    def note_changed_layer(self) -> None:
        """Note that a layer is in another state: moved, merged, in another mode."""
        self.layer_states = object()


class LayerSelection:
    """The selection of a layer that may have other adapters than the model, in the place of the model's.

    Which ones is a part of the model's selection, so that each call has them pinned: it cannot be seen here whether
    the layer differs, only in a selection's ``by_layer``.
    """

    def __init__(self, of_model: ActiveSelection) -> None:
        self.of_model = of_model

    @property
    def current(self) -> Selection:
        """The selection of a forward pass of the layer in this context."""
        selection = self.of_model.current
        choice = selection.by_layer.get(self)
        return selection if choice is None else choice.current

    @property
    def asked(self) -> Sequence[str]:
        """The names that the layer was asked to select, or else the model."""
        current = self.of_model.current
        choice = (self.of_model.default if current.disabled else current).by_layer.get(self)
        return self.of_model.asked if choice is None else choice.asked

    def __getattr__(self, name: str) -> Any:
        if name == "of_model":  # it is being copied
            raise AttributeError(name)
        return getattr(self.of_model, name)
