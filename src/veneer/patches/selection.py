"""A selection: the adapters that a forward pass uses, for all rows or for each row its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.errors import AdapterError
from veneer.patches.row_layout import ONE_BY_ONE, ROWS, Layout, spans
from veneer.patches.row_order import RowOrder, numbers, on_device, row_order, row_owners

# The name that stands for "no adapter" in a per-row choice, as in peft.
BASE = "__base__"

# The layers that have other adapters than the model, in most selections.
_NONE: Mapping[object, LayerChoice] = {}


@dataclass(frozen=True)
class LayerChoice:
    """The adapters of one layer that has others than the model.

    Attributes:
        asked: the names that the layer was asked to select, those of adapters that are not on the model included.
        selection: the adapters of those that are.
        enabled: False where the layer runs as in the base.
    """

    asked: tuple[str, ...]
    selection: Selection
    enabled: bool

    @property
    def current(self) -> Selection:
        """The selection of a forward pass of the layer."""
        return self.selection if self.enabled else DISABLED

    def for_call(self, task_ids: Tensor | None) -> LayerChoice:
        """Return the same for one call."""
        return replace(self, selection=self.selection.for_call(task_ids))

    def renamed(self, names: Mapping[str, str | None]) -> LayerChoice:
        """Return the same with other names for adapters; ``None`` leaves one out."""
        asked, selected = (_renamed(own, names) for own in (self.asked, self.selection.names))
        return LayerChoice(asked, Selection(selected), self.enabled)


class Slots(Protocol):
    """The slots of a bank that hold the adapters of one batch."""

    def stacked(self, layer: object) -> Any:
        """Return the stacked adapters of a layer; ``None`` where none of the batch's is in its slots."""

    def rest(self, layer: object) -> tuple[str, ...]:
        """Return the adapters that a layer computes row by row."""


@dataclass(frozen=True)
class Selection:
    """The adapters of one forward pass.

    Attributes:
        names: the adapters, in the order in which they are applied to every row.
        rows: instead, one adapter's name (or ``"__base__"``) for each row of the batch, or each part of a packed row.
        task_ids: the task of each row, shape ``(rows,)``, for methods that keep several tasks in one adapter.
        counts: the tokens of each part, where several sequences are packed into one row, ``(1, tokens, ...)``.
        kept: the tokens of a packed row for which the model computes logits, as its ``logits_to_keep``.
        slots: the slots of a bank that hold the rows' adapters.
        shares: the rows' shares of the images of the call, for layers that see those; ``None`` without any.
        for_one_call: True where it was made for one call of the model, and is no other's.
        disabled: True where adapters are switched off, which rows of a call do not change.
        by_layer: a layer's ``LayerSelection`` -> its adapters, for layers that have others.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    task_ids: Tensor | None = field(default=None, compare=False)
    counts: tuple[int, ...] | None = None
    shares: tuple[int, ...] | None = field(default=None, compare=False)
    _groups: dict[Any, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _orders: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    for_one_call: bool = field(default=False, repr=False, compare=False)
    disabled: bool = field(default=False, compare=False)
    by_layer: Mapping[object, LayerChoice] = field(default_factory=lambda: _NONE, hash=False)
    kept: Tensor | int | None = field(default=None, repr=False, compare=False)
    slots: Slots | None = field(default=None, repr=False, compare=False)

    def for_call(self, task_ids: Tensor | None) -> Selection:
        """Return the same for one call, with the call's tasks if it names any."""
        tasks = self.task_ids if task_ids is None else task_ids
        shared = (self.counts, self.shares, self._groups, self._orders)
        by_layer = self.by_layer and {layer: choice.for_call(tasks) for layer, choice in self.by_layer.items()}
        return Selection(self.names, self.rows, tasks, *shared, True, self.disabled, by_layer, self.kept, self.slots)

    def renamed(self, names: Mapping[str, str | None]) -> Selection:
        """Return the same for all rows with other names for adapters; ``None`` leaves one out."""
        by_layer = {layer: choice.renamed(names) for layer, choice in self.by_layer.items()}
        return Selection(_renamed(self.names, names), by_layer=by_layer)

    @property
    def concerned(self) -> tuple[str, ...]:
        """The adapters that the pass uses in any layer."""
        if not self.by_layer:
            return self.applied
        return (*self.applied, *(name for choice in self.by_layer.values() for name in choice.selection.names))

    @property
    def used(self) -> tuple[str, ...]:
        """The adapters that rows name, each once."""
        return self._used_names() if torch.compiler.is_compiling() else self._used

    # Compiled code cannot take the lock of a cached property.
    @cached_property
    def _used(self) -> tuple[str, ...]:
        return self._used_names()

    def _used_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in self.rows or () if name != BASE))

    @property
    def applied(self) -> tuple[str, ...]:
        """The adapters of the pass, each once, whether all rows use them or some."""
        return self.names if self.rows is None else self.used

    @property
    def by_token(self) -> bool:
        """True where adapters are named for the tokens of a packed row."""
        return self.counts is not None

    @property
    def entries(self) -> int:
        """The number of rows, or of tokens of a packed row, that have an adapter each."""
        return len(self.rows or ()) if self.counts is None else sum(self.counts)

    @property
    def is_mixed(self) -> bool:
        """True for rows that differ in their adapters."""
        return self.rows is not None and len(set(self.rows)) > 1

    @cached_property
    def of_one(self) -> Selection | None:
        """The selection of the one adapter that all rows name; ``None`` where they differ, or name the base."""
        if self.rows is None or len(set(self.rows)) != 1 or self.rows[0] == BASE:
            return None
        return Selection((self.rows[0],), None, self.task_ids, for_one_call=self.for_one_call)

    def rows_of(self, name: str, length: int, device: torch.device) -> Tensor | None:
        """Return the indices of the rows that use an adapter, as :meth:`groups` has them; ``None`` for all rows."""
        return None if self.rows is None else self.groups(length, device)[name]

    def order(self, key: Any, names: Sequence[str | None], x: Tensor, layout: Layout) -> RowOrder:
        """Return the rows of ``x`` sorted by adapter, for layers on which adapters are stacked.

        Args:
            key: stands for ``names``, so that the order is worked out once for all layers.
            names: the adapter of each part of the stack; ``None`` for a part that no row uses.
            x: the layer's input.
            layout: of its rows.
        """
        known = (key, x.shape[0], x.device, layout, self.shares)
        order = self._orders.get(known)
        if order is None:
            placed = self._placed(x.shape[0], layout)
            order = row_order([placed.get(name or BASE, ()) for name in names], x.shape[0], x.device)
            keep_few(self._orders, known, order)
        return order

    def owner(self, key: Any, places: Mapping[str, int], rest: int, x: Tensor, layout: Layout) -> Tensor:
        """Return the number of each row of ``x`` in a table of adapters' vectors, shape ``(rows,)``.

        Args:
            key: stands for ``places``.
            places: adapter's name -> its number.
            rest: the number for the rows of all others.
            x: the layer's input.
            layout: of its rows.
        """
        known = (key, "owner", x.shape[0], x.device, layout, self.shares)
        owner = self._orders.get(known)
        if owner is None:
            placed = self._placed(x.shape[0], layout)
            groups = {places[name]: spans for name, spans in placed.items() if name in places}
            owner = row_owners(groups, rest, x.shape[0], x.device)
            keep_few(self._orders, known, owner)
        return owner

    def packed(self, x: Tensor) -> bool:
        """Tell whether the rows of ``x`` are the tokens of a packed sequence, behind a first dimension of 1."""
        return self.by_token and x.ndim > 1 and x.shape[0] == 1 != self.entries

    def groups(self, length: int, device: torch.device, layout: Layout = ROWS) -> Mapping[str, Tensor]:
        """Return the indices of each adapter's rows in a tensor that has ``length`` along their dimension.

        Where a model makes more rows of each (beams, or tokens flattened into the batch), a row's copies share its
        adapter; they lie side by side, or as ``layout`` says. Worked out once a shape, not once a layer or a call.
        """
        key = (length, device, layout, self.shares)
        groups = self._groups.get(key)
        if groups is None:
            placed = self._placed(length, layout)
            groups = dict(zip(placed, on_device(device, lambda: list(map(numbers, placed.values()))), strict=True))
            keep_few(self._groups, key, groups)
        return groups

    def tasks(self, length: int) -> Tensor | None:
        """Return the task of each row of a batch of ``length``, which may hold copies as in :meth:`groups`."""
        given = self.task_ids
        if given is None or len(given) == length:
            return given
        if given.ndim != 1 or not len(given) or length % len(given):
            raise AdapterError(
                f"task_ids has the shape {tuple(given.shape)}, and the batch {length} rows.",
                hint="Give one task's number for each row.",
            )
        return given.repeat_interleave(length // len(given))

    def _placed(self, length: int, layout: Layout) -> dict[str, list[range]]:
        """Return the same on the host, as spans of indices."""
        rows = self.rows or ()
        if rows and not self.is_mixed:
            by_row: list[tuple[int, range]] | None = [(0, range(length))]
        elif layout.images:
            by_row = None if self.shares is None else spans(layout, length, self.shares)
            if by_row is None:
                raise AdapterError(
                    f"Which of {length} parts of images belong to which row is not known.",
                    hint=ONE_BY_ONE,
                )
        else:
            by_row = spans(layout, length, self.counts or (1,) * len(rows))
        if by_row is None:
            raise wrong_count(self, length)
        indices: dict[str, list[range]] = {}
        for row, span in by_row:
            if rows[row] != BASE:
                indices.setdefault(rows[row], []).append(span)
        return indices

    # -- layers that see some of the tokens ----------------------------------------------------------------

    def behind_backbone(self, x: Tensor) -> Selection:
        """Return the selection for a layer behind the backbone, whose input ``x`` may hold the kept tokens alone."""
        if self.kept is None:
            return self
        length = x.shape[1] if self.packed(x) else x.shape[0]
        return self._of_kept if length == self._of_kept.entries else self

    @cached_property
    def _of_kept(self) -> Selection:
        """The selection of the tokens of a packed row for which the model computes logits."""
        everything = torch.arange(self.entries, device="cpu")
        chosen = 0 if self.kept is None else self.kept
        kept = everything[slice(-chosen, None) if isinstance(chosen, int) else chosen.cpu()]
        if torch.equal(kept, everything):
            return self
        stops = torch.tensor(self.counts, device="cpu").cumsum(0)
        parts = torch.bucketize(kept, stops, right=True).tolist()
        rows = tuple((self.rows or ())[part] for part in parts)
        one_call = self.for_one_call
        return Selection((), rows, self.task_ids, (1,) * len(rows), for_one_call=one_call, slots=self.slots)


def wrong_count(selection: Selection, length: int) -> AdapterError:
    """Return the error for a selection that names adapters for more or fewer rows, or tokens, than there are."""
    given, what = ("tokens", "tokens") if selection.by_token else ("names", "rows")
    return AdapterError(
        f"adapter_names has {selection.entries} {given}, and the batch {length} {what}. "
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{selection.entries} and {length}.",
        hint=f'Name the adapter of each of the {what}; "{BASE}" is the base model.',
    )


_FEW = 32


def keep_few(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep a value by its key, and forget all others where they have become many."""
    if len(kept) >= _FEW:
        kept.clear()
    kept[key] = value


def _renamed(own: tuple[str, ...], names: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(name for name in (names.get(name, name) for name in own) if name is not None)


NOTHING = Selection()
DISABLED = Selection(disabled=True)
