"""Computes a batch whose rows use different adapters at the cost of a single one.

The fused forms (``fused.py``) of the adapters on one layer are stacked, ranks padded with zeros to the largest:

    y'_n = s_k * y_n + (x_n A_k) B_k + c_k        A: (adapters, in, R), B: (adapters, R, out)

with ``k`` the adapter of row ``n``. The rows are sorted by adapter once for all layers (``RowOrder``), so that a layer
takes two batched products however many adapters there are. A row of the base is scaled by one and shifted by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.patches.fused import FusedPatch, TensorVersions, base_output
from veneer.patches.row_order import RowOrder
from veneer.patches.selection import NOTHING, Selection


@dataclass(frozen=True)
class StackedPatches:
    """Holds the fused forms of several adapters on one layer; a part that is ``None`` changes nothing for any of them.

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
        """Return the base layer's input for the rows ``x``, shape ``(rows, ..., in)``."""
        return x if self.inner is None else (x * _of_rows(self.inner, order, x)).to(x.dtype)

    def change(self, y: Tensor, x: Tensor, order: RowOrder, overwrite: bool) -> Tensor:
        """Return the layer's output, from the base's output ``y`` for :meth:`seen`.

        Args:
            y: shape ``(rows, ..., out)``.
            x: the layer's input, shape ``(rows, ..., in)``.
            order: the rows by adapter.
            overwrite: whether ``y`` may be overwritten, since nobody else sees it.
        """
        y = y.contiguous() if overwrite else y.clone(memory_format=torch.contiguous_format)
        if self.outer is None and self.shift is None:
            return self._add(y, x, order)
        wide = y.float() if self.outer is None else y * _of_rows(self.outer, order, y)
        if self.shift is not None:
            wide = wide + _of_rows(self.shift, order, y)
        return self._add(wide, x, order).to(y.dtype)

    def _add(self, y: Tensor, x: Tensor, order: RowOrder) -> Tensor:
        if self.down is None or self.up is None:
            return y
        if order.rows is None:
            hidden, stacked = _hidden(x, self.down), y.view(len(self.up), -1, y.shape[-1])
            if y.dtype is self.up.dtype:
                stacked.baddbmm_(hidden, self.up)
            else:
                stacked.add_(torch.bmm(hidden, self.up))
            return y
        product = _padded if order.is_even else _one_by_one
        change = product(x, self.down, self.up, order)
        changed = y.index_select(0, order.rows)
        return y.index_copy_(0, order.rows, changed.add_(change.view_as(changed)))


def _hidden(x: Tensor, down: Tensor) -> Tensor:
    """Return ``x A`` of rows that are sorted by adapter, as many for each; shape ``(adapters, places, R)``."""
    return torch.bmm(x.reshape(len(down), -1, x.shape[-1]).to(down.dtype), down)


def _padded(x: Tensor, down: Tensor, up: Tensor, order: RowOrder) -> Tensor:
    """Return ``(x A) B`` of the rows that name an adapter, sorted by adapter; shape ``(rows, ..., out)``."""
    assert order.take is not None
    taken = x.index_select(0, order.take)
    change = torch.bmm(_hidden(taken, down), up)
    if order.keep is None:
        return change
    return change.view(taken.shape[0], -1).index_select(0, order.keep)


def _one_by_one(x: Tensor, down: Tensor, up: Tensor, order: RowOrder) -> Tensor:
    """Return the same, adapter by adapter: where one has most rows, padding all others to it would cost more."""
    assert order.rows is not None
    pieces = x.index_select(0, order.rows).split(list(order.sizes))
    return torch.cat(
        [
            torch.mm(torch.mm(p.reshape(-1, x.shape[-1]).to(a.dtype), a), b)
            for p, a, b in zip(pieces, down, up, strict=True)
        ]
    )


def _of_rows(vectors: Tensor, order: RowOrder, like: Tensor) -> Tensor:
    """Return each row's vector, in a shape that broadcasts over ``like``."""
    by_row = vectors.index_select(0, order.owner)
    return by_row.view(by_row.shape[0], *[1] * (like.ndim - 2), by_row.shape[-1])


def stack(members: Sequence[FusedPatch]) -> StackedPatches:
    """Stack the fused forms of a layer's adapters."""
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
    """Stack vectors as rows, with ``rest`` for an adapter without one and, last, for the base."""
    like = next((member for member in members if member is not None), None)
    if like is None:
        return None
    neutral = torch.full_like(like, rest)
    return torch.stack([*(neutral if member is None else member for member in members), neutral])


class CachedMixedForward(TensorVersions):
    """Caches a layer's forward pass for rows of several adapters, for inference.

    Args:
        selection: the selection.
        names: those of its adapters that are on the layer.
        sources: the tensors that the forward pass is made from.
        known: adapter's name -> its fused form, where that was made already.
        fuse: returns an adapter's fused form, or ``None`` when it has none.

    Attributes:
        members: adapter's name -> its fused form.
        together: the adapters that have one.
    """

    __slots__ = ("_stacked", "members", "names", "together")

    def __init__(
        self,
        selection: Selection,
        names: tuple[str, ...],
        sources: Sequence[Tensor],
        known: Mapping[str, FusedPatch | None],
        fuse: Callable[[tuple[str, ...]], FusedPatch | None],
    ) -> None:
        super().__init__(selection, sources)
        self.names = names
        self.members = {name: known[name] if name in known else fuse((name,)) for name in names}
        self.together = tuple(name for name in names if self.members[name] is not None)
        self._stacked: StackedPatches | None = None

    def without(
        self, adapter: str, sources: Callable[[tuple[str, ...]], Sequence[Tensor]]
    ) -> CachedMixedForward | None:
        """Return the same without an adapter; ``None`` where nothing is left, or made for one call.

        Args:
            adapter: its name.
            sources: gives the tensors of adapters.
        """
        if adapter not in self.names:
            return self
        names = tuple(name for name in self.names if name != adapter)
        if not names or not self.is_current(NOTHING):
            return None
        return CachedMixedForward(NOTHING, names, sources(names), self.members, lambda _: None)

    @property
    def stacked(self) -> StackedPatches:
        """The fused forms of the adapters that have one, stacked when they are first computed with."""
        stacked = self._stacked
        if stacked is None:
            stacked = self._stacked = stack([member for member in self.members.values() if member is not None])
        return stacked

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor, order: RowOrder) -> Tensor:
        """Return the output for rows ``x``, shape ``(rows, ..., in)``, of the adapters in :attr:`together`."""
        stacked = self.stacked
        y, overwrite = base_output(base, stacked.seen(x, order))
        return stacked.change(y, x, order, overwrite)
