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


def row_order(groups: Sequence[Sequence[int]], length: int, device: torch.device) -> RowOrder:
    """Sort a batch of ``length`` rows by adapter; ``groups`` are the rows of each.

    All is worked out on the host and copied in one piece, so that nothing waits for the device.
    """
    sizes = tuple(map(len, groups))
    places = max(sizes)
    rows = [row for group in groups for row in group]
    owner = [len(groups)] * length
    for number, group in enumerate(groups):
        for row in group:
            owner[row] = number
    even = min(sizes) == places
    if even and rows == list(range(length)):
        return RowOrder(None, None, None, on_device(device, owner)[0], sizes)
    padded = [row for group in groups for row in (*group, *[0] * (places - len(group)))]
    filled = [number * places + place for number, size in enumerate(sizes) for place in range(size)]
    take, sorted_rows, keep, owners = on_device(device, padded, rows, filled, owner)
    return RowOrder(take, sorted_rows, None if even else keep, owners, sizes)


def on_device(device: torch.device, *numbers: Sequence[int]) -> tuple[Tensor, ...]:
    """Return lists of whole numbers as tensors, copied together."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        together = torch.tensor([number for list_ in numbers for number in list_], dtype=torch.int64, device="cpu")
        return tuple(together.to(device).split([len(list_) for list_ in numbers]))
    # What evaluation makes and keeps is there for training too, which cannot save an inference tensor.
    with torch.inference_mode(False):
        return on_device(device, *numbers)
