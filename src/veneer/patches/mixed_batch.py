"""Computes a batch whose rows use different adapters at the cost of a single one.

The fused forms (``fused.py``) of the adapters on one layer are stacked, ranks padded with zeros to the largest:

    y'_n = s_k * y_n + (x_n A_k) B_k + c_k        A: (adapters, in, R), B: (adapters, R, out)

with ``k`` the adapter of row ``n``. The rows are sorted by adapter once for all layers (``RowOrder``), so that a layer
takes two batched products however many adapters there are, and two more for those with many more rows than others. A
row of the base is scaled by one and shifted by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.patches.fused import FusedPatch, TensorVersions, base_output, widened
from veneer.patches.row_layout import Layout
from veneer.patches.row_order import RowBlock, RowOrder
from veneer.patches.selection import NOTHING, Selection

# The factors of several adapters are put together for one product where each has at most so many numbers: copying more
# takes longer than a product for each.
_GATHERED = 1 << 16


@dataclass(frozen=True)
class StackedFactors:
    """Holds the low-rank factors of several adapters on one layer.

    Attributes:
        key: stands for ``names`` in the selection.
        names: the adapter of each part; ``None`` for a part that no row uses.
        down: ``A``.
        up: ``B``.
    """

    key: Any
    names: tuple[str | None, ...]
    down: Tensor
    up: Tensor

    def added(self, y: Tensor, x: Tensor, order: RowOrder) -> Tensor:
        """Return ``y``, overwritten, with the product of ``x`` and each row's factors."""
        if order.rows is None:
            hidden, stacked = _hidden(x, self.down), y.view(len(self.up), -1, y.shape[-1])
            if y.dtype is self.up.dtype:
                stacked.baddbmm_(hidden, self.up)
            else:
                stacked.add_(torch.bmm(hidden, self.up))
            return y
        pieces = [product for block in order.blocks for product in self._products(x, block, order.sizes)]
        change = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        changed = y.index_select(0, order.rows)
        return y.index_copy_(0, order.rows, changed.add_(change.view_as(changed)))

    def _products(self, x: Tensor, block: RowBlock, sizes: Sequence[int]) -> Iterator[Tensor]:
        """Yield ``(x A) B`` of the rows of a block, sorted by adapter; shape ``(rows * ..., out)`` in all."""
        taken = x.index_select(0, block.take)
        if block.adapters is None:
            yield _product(taken, self.down, self.up, block.keep)
        elif len(block.adapters) > 1 and self.down[0].numel() + self.up[0].numel() <= _GATHERED:
            down, up = (factors.index_select(0, block.numbers) for factors in (self.down, self.up))
            yield _product(taken, down, up, block.keep)
        else:
            places = len(taken) // len(block.adapters)
            for number, own in zip(block.adapters, taken.split(places), strict=True):
                size = sizes[number]
                yield _product(own[:size], self.down[number : number + 1], self.up[number : number + 1], None)


@dataclass(frozen=True)
class StackedPatches:
    """Holds the fused forms of several adapters on one layer; a part that is ``None`` changes nothing for any of them.

    Attributes:
        key: stands for ``places`` in the selection.
        places: adapter's name -> its row in the vectors.
        factors: those of the low-rank products; what several hold of one adapter adds up.
        inner: ``i``, shape ``(places + 1, in)``; the last row is the base's.
        outer: ``s``, shape ``(places + 1, out)``.
        shift: ``c``, shape ``(places + 1, out)``.
    """

    key: Any
    places: Mapping[str, int]
    factors: tuple[StackedFactors, ...] = ()
    inner: Tensor | None = None
    outer: Tensor | None = None
    shift: Tensor | None = None

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor, selection: Selection, layout: Layout) -> Tensor:
        """Return the layer's output.

        Args:
            base: the base layer.
            x: its input, shape ``(rows, ..., in)``.
            selection: names the adapter of each row.
            layout: of the rows.
        """
        orders = [selection.order(stack.key, stack.names, x, layout) for stack in self.factors]
        vectors = next((v for v in (self.inner, self.outer, self.shift) if v is not None), None)
        if vectors is None:
            return self._add(*base_output(base, x), x, orders)
        owner = selection.owner(self.key, self.places, len(vectors) - 1, x, layout)
        seen = x if self.inner is None else (x * _of_rows(self.inner, owner, x)).to(x.dtype)
        y, overwrite = base_output(base, seen)
        if self.outer is None and self.shift is None:
            return self._add(y, overwrite, x, orders)
        wide = widened(y) if self.outer is None else y * _of_rows(self.outer, owner, y)
        if self.shift is not None:
            wide = wide + _of_rows(self.shift, owner, y)
        return self._add(wide, wide is not y, x, orders).to(y.dtype)

    def _add(self, y: Tensor, overwrite: bool, x: Tensor, orders: Sequence[RowOrder]) -> Tensor:
        """Return ``y`` with all products; it may be overwritten if nobody else sees it."""
        total = widened(y) if len(orders) > 1 else y
        if total is not y or overwrite:
            total = total.contiguous()
        else:
            total = total.clone(memory_format=torch.contiguous_format)
        for stack, order in zip(self.factors, orders, strict=True):
            total = stack.added(total, x, order) if any(order.sizes) else total
        return total.to(y.dtype)


def _hidden(x: Tensor, down: Tensor) -> Tensor:
    """Return ``x A`` of rows that are sorted by adapter, as many for each; shape ``(adapters, places, R)``."""
    return torch.bmm(x.reshape(len(down), -1, x.shape[-1]).to(down.dtype), down)


def _product(x: Tensor, down: Tensor, up: Tensor, keep: Tensor | None) -> Tensor:
    """Return ``(x A) B`` of rows that are sorted by adapter, as many for each, or of those to ``keep`` alone."""
    change = torch.bmm(_hidden(x, down), up)
    if keep is not None:
        change = change.view(x.shape[0], -1).index_select(0, keep)
    return change.view(-1, up.shape[-1])


def _of_rows(vectors: Tensor, owner: Tensor, like: Tensor) -> Tensor:
    """Return each row's vector, in a shape that broadcasts over ``like``."""
    by_row = vectors.index_select(0, owner)
    return by_row.view(by_row.shape[0], *[1] * (like.ndim - 2), by_row.shape[-1])


def stack(fused: Mapping[str, FusedPatch]) -> StackedPatches:
    """Stack the fused forms of a layer's adapters, which are given by their names."""
    names, members = tuple(fused), list(fused.values())
    rank = max((m.down.shape[1] for m in members if m.down is not None), default=0)
    stacked = StackedPatches(
        names,
        {name: place for place, name in enumerate(names)},
        (),
        *(_vectors([getattr(member, part) for member in members], rest) for part, rest in NEUTRAL.items()),
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
    return replace(stacked, factors=(StackedFactors(names, names, down, up),))


# What the vectors are for an adapter that has none, and for the base.
NEUTRAL = {"inner": 1.0, "outer": 1.0, "shift": 0.0}


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
            fused = {name: member for name, member in self.members.items() if member is not None}
            stacked = self._stacked = stack(fused)
        return stacked
