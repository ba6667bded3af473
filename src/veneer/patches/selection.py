"""Which adapters a forward pass uses: the model's standing choice, or one made for a single call.

The layers of a model share one :class:`ActiveSelection`, so that choosing is one assignment however many layers there
are. A choice for a call lives in a context variable: threads and async tasks do not see each other's. Compiled code
cannot read one, and is guarded by a copy that belongs to the thread instead. A call of the model (``calls.py``) makes
what it finds selected such a choice, so that no other thread changes it on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError
from veneer.patches.cast_cache import CastCache
from veneer.patches.row_layout import ONE_BY_ONE, ROWS, Layout, owners
from veneer.patches.row_order import RowOrder, row_order
from veneer.patches.underway import Concerned, Underway

# The name that stands for "no adapter" in a per-row choice, as in peft.
BASE = "__base__"


@dataclass(frozen=True)
class Selection:
    """What one forward pass applies.

    Attributes:
        names: the adapters, in the order in which they are applied to every row.
        rows: instead, one adapter's name (or ``"__base__"``) for each row of the batch.
        task_ids: the task of each row, shape ``(rows,)``, for methods that keep several tasks in one adapter.
        by_token: whether ``rows`` are the tokens of one packed sequence, a batch of ``(1, tokens, ...)``.
        shares: the rows' shares of the images of the call, for layers that see those; ``None`` without any.
        for_one_call: whether it was made for one call of the model, and is no other's.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    task_ids: Tensor | None = field(default=None, compare=False)
    by_token: bool = False
    shares: tuple[int, ...] | None = field(default=None, compare=False)
    _groups: dict[tuple[int, torch.device, Layout], Mapping[str, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _orders: dict[Any, RowOrder] = field(default_factory=dict, repr=False, compare=False)
    for_one_call: bool = field(default=False, repr=False, compare=False)

    def for_call(self, task_ids: Tensor | None) -> Selection:
        """The same for one call, with its tasks if it names any."""
        tasks = self.task_ids if task_ids is None else task_ids
        return Selection(self.names, self.rows, tasks, self.by_token, self.shares, self._groups, self._orders, True)

    @property
    def used(self) -> tuple[str, ...]:
        """The adapters that rows name, each once."""
        return tuple(dict.fromkeys(name for name in self.rows or () if name != BASE))

    @property
    def applied(self) -> tuple[str, ...]:
        """The adapters of the pass, each once, whether all rows use them or some."""
        return self.names if self.rows is None else self.used

    @property
    def is_mixed(self) -> bool:
        """Whether the rows differ in their adapters."""
        return self.rows is not None and len(set(self.rows)) > 1

    def rows_of(self, name: str, length: int, device: torch.device) -> Tensor | None:
        """The indices of the rows that use an adapter, as in :meth:`groups`; ``None`` is all of them."""
        return None if self.rows is None else self.groups(length, device)[name]

    def order(self, names: tuple[str, ...], length: int, device: torch.device, layout: Layout = ROWS) -> RowOrder:
        """How ``length`` rows are sorted by adapter, for the layers on which ``names`` are stacked."""
        key = (names, length, device, layout)
        if key not in self._orders:
            groups = self.groups(length, device, layout)
            self._orders[key] = row_order([groups[name] for name in names], length)
        return self._orders[key]

    def packed(self, x: Tensor) -> bool:
        """Whether the rows of ``x`` are the tokens of a packed sequence, behind a first dimension of 1."""
        return self.by_token and x.ndim > 1 and x.shape[0] == 1

    def groups(self, length: int, device: torch.device, layout: Layout = ROWS) -> Mapping[str, Tensor]:
        """Adapter's name -> the indices of its rows in a tensor that has ``length`` along their dimension, if any.

        Where a model makes more rows of each (beams, or tokens flattened into the batch), a row's copies share its
        adapter; they lie side by side, or as ``layout`` says. Worked out once a shape, not once a layer.
        """
        key = (length, device, layout)
        if key not in self._groups:
            self._groups[key] = self._grouped(length, device, layout)
        return self._groups[key]

    def tasks(self, length: int) -> Tensor | None:
        """The task of each row of a batch of ``length``, which may hold copies as in :meth:`groups`."""
        given = self.task_ids
        if given is None or len(given) == length:
            return given
        if given.ndim != 1 or not len(given) or length % len(given):
            raise AdapterError(
                f"task_ids has the shape {tuple(given.shape)}, and the batch {length} rows.",
                hint="Give one task's number for each row.",
            )
        return given.repeat_interleave(length // len(given))

    def _grouped(self, length: int, device: torch.device, layout: Layout) -> Mapping[str, Tensor]:
        rows = self.rows or ()
        if rows and not self.is_mixed:
            owner: list[int] | None = [0] * length
        elif layout.images:
            owner = None if self.shares is None else owners(layout, length, self.shares)
            if owner is None:
                raise AdapterError(
                    f"Which of {length} parts of images belong to which row is not known.",
                    hint=ONE_BY_ONE,
                )
        else:
            owner = owners(layout, length, (1,) * len(rows))
        if owner is None:
            given, what = ("tokens", "tokens") if self.by_token else ("names", "rows")
            raise AdapterError(
                f"adapter_names has {len(rows)} {given}, and the batch {length} {what}.",
                hint=f'Name the adapter of each of the {what}; "{BASE}" is the base model.',
            )
        found: dict[str, list[int]] = {}
        for index, row in enumerate(owner):
            if rows[row] != BASE:
                found.setdefault(rows[row], []).append(index)
        return {name: torch.tensor(index, device=device) for name, index in found.items()}


NOTHING = Selection()


class _Thread(threading.local):
    """What one thread has chosen for the calls it makes now."""

    def __init__(self) -> None:
        # Set for each thread: compiled code is guarded on an instance's attributes, and not on a class's.
        self.chosen: Selection | None = None


class ActiveSelection:
    """The state that the layers of one model share: what is selected.

    Attributes:
        standing: what is selected where nothing else is chosen.
        enabled: whether it is.
        choosing: held while ``standing`` is changed by what it was, or by which adapters there are.
        underway: the calls of the model.
    """

    def __init__(self) -> None:
        self.__setstate__({"default": NOTHING, "enabled": True})

    @property
    def selection(self) -> Selection:
        """What a forward pass in this context uses."""
        chosen = self._thread.chosen if torch.compiler.is_compiling() else self._in_context()
        if chosen is not None:
            return chosen
        return self.default if self.enabled else NOTHING

    def _in_context(self) -> Selection | None:
        """The choice made for this call, if one was."""
        for switch, selection, _ in _CALLS.get() or ():
            if switch is self:
                return selection
        return None

    @property
    def in_call(self) -> bool:
        """Whether the model is being called, or computes something again on the way back."""
        return torch.compiler.is_compiling() or bool(self.calls()) or torch._C._current_graph_task_id() != -1

    def calls(self) -> list[object]:
        """The calls of the model that this context is, or was, inside of."""
        return [call for switch, _, call in _CALLS.get() or () if switch is self and call is not None]

    def push(self, selection: Selection, call: object = None) -> Token[Any]:
        """Use ``selection`` from now on in this thread or task, until :meth:`pop` is given what this returns."""
        token = _CALLS.set(((self, selection, call), *(_CALLS.get() or ())))
        self._thread.chosen = selection
        return token

    def pop(self, token: Token[Any]) -> None:
        """Use again what was used before :meth:`push`."""
        _CALLS.reset(token)
        # Not what it was before: with tasks that take turns, that may be another task's.
        self._thread.chosen = self._in_context()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in a thread that has another's context: compiled code sees the choice then too."""
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

        A compiled model sees the choice of its thread, whichever task made it: do not await inside the block.
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

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "enabled": self.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.default: Selection = state["default"]
        self.enabled: bool = state["enabled"]
        self.choosing = threading.RLock()
        self.underway = Underway()
        # What compiled code sees of the context variable below.
        self._thread = _Thread()
        self.widened = CastCache()


# Innermost first: (whose choice, the choice, the call that made it or ``None``).
_CALLS: ContextVar[tuple[tuple[ActiveSelection, Selection, object], ...] | None] = ContextVar(
    "veneer_selection", default=None
)


def selected() -> Selection:
    """What was chosen for the innermost call or block of this context; none where nothing was."""
    calls = _CALLS.get()
    return calls[0][1] if calls else NOTHING


def selected_tasks(length: int) -> Tensor | None:
    """The task of each row of a batch of ``length``, as the call that is under way names them."""
    calls = _CALLS.get()
    return calls[0][1].tasks(length) if calls else None
