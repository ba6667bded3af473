"""The rows of a batch sorted by adapter, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """Rows sorted by adapter, each adapter with as many places as the one with the most rows.

    Attributes:
        take: the row that is put in each place, ``(adapters * places,)``; ``None`` when the rows lie so already.
        rows: the rows that name an adapter, sorted by adapter; ``None`` like ``take``.
        keep: the places of ``rows``; ``None`` when every place is a row's.
        owner: for each row of the batch its adapter's number, or the number of adapters; shape ``(length,)``.
        sizes: the number of rows of each adapter.
    """

    take: Tensor | None
    rows: Tensor | None
    keep: Tensor | None
    owner: Tensor
    sizes: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """True where padding every adapter to the same number of rows makes no more than twice as many."""
        return len(self.sizes) * max(self.sizes) <= 2 * sum(self.sizes)


def row_order(groups: Sequence[Tensor], length: int) -> RowOrder:
    """Sort a batch of ``length`` rows by adapter; ``groups`` are the rows of each."""
    sizes = tuple(len(group) for group in groups)
    places, device = max(sizes), groups[0].device
    owner = torch.full((length,), len(groups), device=device)
    take = torch.zeros(len(groups), places, dtype=torch.int64, device=device)
    real = torch.zeros(len(groups), places, dtype=torch.bool, device=device)
    for number, group in enumerate(groups):
        owner[group] = number
        take[number, : len(group)] = group
        real[number, : len(group)] = True
    rows = torch.cat(list(groups))
    even = sum(sizes) == len(groups) * places
    if even and torch.equal(rows, torch.arange(length, device=device)):
        return RowOrder(None, None, None, owner, sizes)
    keep = None if even else real.flatten().nonzero().flatten()
    return RowOrder(take.flatten(), rows, keep, owner, sizes)
