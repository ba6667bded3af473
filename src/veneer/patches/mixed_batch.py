"""A batch whose rows use different adapters, computed at the cost of a single one.

The folded forms (``folded.py``) of the adapters on one layer are stacked, ranks padded with zeros to the largest:

    y'_n = s_k * y_n + (x_n A_k) B_k + c_k        A: (adapters, in, R), B: (adapters, R, out)

with ``k`` the adapter of row ``n``. The rows are sorted by adapter once for all layers (``RowOrder``), so that a layer
takes two batched products however many adapters there are. A row of the base has a factor of one and a shift of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.patches.fused import FusedPatch, TensorVersions, base_output
from veneer.patches.row_order import RowOrder
from veneer.patches.selection import Selection


@dataclass(frozen=True)
class StackedPatches:
    """The folded forms of several adapters on one layer; a part that is ``None`` changes nothing for any of them.

    Attributes:
        down: ``A``.
        up: ``B``.
        inner: ``i``, shape ``(adapters + 1, in)``; the last row is the base's.
        outer: ``s``, shape ``(adapters + 1, out)``.
        shift: ``c``, shape ``(adapters + 1, out)``.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None
    shift: Tensor | None = None

    def seen(self, x: Tensor, order: RowOrder) -> Tensor:
        """What the base layer sees of the rows ``x``, shape ``(rows, ..., in)``."""
        return x if self.inner is None else (x * _of_rows(self.inner, order, x)).to(x.dtype)

    def change(self, y: Tensor, x: Tensor, order: RowOrder, own: bool) -> Tensor:
        """The layer's output from the base's output ``y`` for :meth:`seen`.

        Args:
            y: shape ``(rows, ..., out)``.
            x: the layer's input, shape ``(rows, ..., in)``.
            order: the rows by adapter.
            own: whether nobody else sees ``y``, so that it may be overwritten.
        """
        y = y.contiguous() if own else y.clone(memory_format=torch.contiguous_format)
        if self.outer is None and self.shift is None:
            return self._add(y, x, order)
        wide = y.float() if self.outer is None else y * _of_rows(self.outer, order, y)
        if self.shift is not None:
            wide = wide + _of_rows(self.shift, order, y)
        return self._add(wide, x, order).to(y.dtype)

    def _add(self, y: Tensor, x: Tensor, order: RowOrder) -> Tensor:
        if self.down is None or self.up is None:
            return y
        product = _padded if order.is_even else _one_by_one
        change = product(x, self.down, self.up, order)
        if order.rows is None:
            return y.add_(change.view_as(y))
        own = y.index_select(0, order.rows)
        return y.index_copy_(0, order.rows, own.add_(change.view_as(own)))


def _padded(x: Tensor, down: Tensor, up: Tensor, order: RowOrder) -> Tensor:
    """``(x A) B`` of the rows that name an adapter, in the order's order; shape ``(rows, ..., out)``."""
    taken = x if order.take is None else x.index_select(0, order.take)
    flat = taken.reshape(down.shape[0], -1, x.shape[-1]).to(down.dtype)
    change = torch.bmm(torch.bmm(flat, down), up)
    if order.keep is None:
        return change
    return change.view(taken.shape[0], -1).index_select(0, order.keep)


def _one_by_one(x: Tensor, down: Tensor, up: Tensor, order: RowOrder) -> Tensor:
    """The same, adapter by adapter: where one has most of the rows, padding all others to it would cost more."""
    assert order.rows is not None
    pieces = x.index_select(0, order.rows).split(list(order.sizes))
    return torch.cat(
        [
            torch.mm(torch.mm(p.reshape(-1, x.shape[-1]).to(a.dtype), a), b)
            for p, a, b in zip(pieces, down, up, strict=True)
        ]
    )


def _of_rows(vectors: Tensor, order: RowOrder, like: Tensor) -> Tensor:
    """Each row's own vector, in a shape that broadcasts over ``like``."""
    own = vectors.index_select(0, order.owner)
    return own.view(own.shape[0], *[1] * (like.ndim - 2), own.shape[-1])


def stack(members: Sequence[FusedPatch]) -> StackedPatches:
    """The folded forms of a layer's adapters, stacked."""
    rank = max((m.down.shape[1] for m in members if m.down is not None), default=0)
    parts = {"inner": 1.0, "outer": 1.0, "shift": 0.0}
    stacked = StackedPatches(
        **{name: _vectors([getattr(m, name) for m in members], rest) for name, rest in parts.items()}
    )
    if not rank:
        return stacked
    like = next(m for m in members if m.down is not None)
    assert like.down is not None
    assert like.up is not None
    down = like.down.new_zeros(len(members), like.down.shape[0], rank)
    up = like.up.new_zeros(len(members), rank, like.up.shape[1])
    for number, member in enumerate(members):
        if member.down is not None and member.up is not None:
            down[number, :, : member.down.shape[1]] = member.down
            up[number, : member.up.shape[0]] = member.up
    return replace(stacked, down=down, up=up)


def _vectors(members: Sequence[Tensor | None], rest: float) -> Tensor | None:
    """Vectors in rows; ``rest`` for an adapter without one, and for the base."""
    like = next((member for member in members if member is not None), None)
    if like is None:
        return None
    neutral = torch.full_like(like, rest)
    return torch.stack([*(neutral if member is None else member for member in members), neutral])


class CachedMixedForward(TensorVersions):
    """A layer's forward pass for rows of several adapters, as inference keeps it.

    Args:
        selection: the selection.
        names: those of its adapters that are on the layer.
        sources: the tensors that it is made from.
        known: the folded forms that are there already.
        folded_form: gives an adapter's folded form, or ``None`` when it has none.

    Attributes:
        members: adapter's name -> its folded form.
    """

    __slots__ = ("members", "names", "stacked", "together")

    def __init__(
        self,
        selection: Selection,
        names: tuple[str, ...],
        sources: Sequence[Tensor],
        known: Mapping[str, FusedPatch | None],
        folded_form: Callable[[tuple[str, ...]], FusedPatch | None],
    ) -> None:
        super().__init__(selection, sources)
        self.names = names
        self.members = {name: known[name] if name in known else folded_form((name,)) for name in names}
        self.together = tuple(name for name in names if self.members[name] is not None)
        self.stacked = stack([member for member in self.members.values() if member is not None])

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor, order: RowOrder) -> Tensor:
        """The output for rows ``x``, shape ``(rows, ..., in)``, of those adapters that have a folded form."""
        y, own = base_output(base, self.stacked.seen(x, order))
        return self.stacked.change(y, x, order, own)
