"""The rows of a batch sorted by adapter, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """Rows sorted by adapter, each adapter with as many places as the one with the most rows.

    Attributes:
        take: the row that is put in each place, ``(adapters * places,)``; ``None`` when the rows lie so already.
        rows: the rows that name an adapter, sorted by adapter; ``None`` like ``take``.
        keep: the places of ``rows``; ``None`` when every place is a row's.
        sizes: the number of rows of each adapter.
    """

    take: Tensor | None
    rows: Tensor | None
    keep: Tensor | None
    sizes: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """True where padding every adapter to the same number of rows makes no more than twice as many."""
        return len(self.sizes) * max(self.sizes) <= 2 * sum(self.sizes)


Spans = Sequence[range]


def row_order(groups: Sequence[Spans], length: int, device: torch.device) -> RowOrder:
    """Sort a batch of ``length`` rows by adapter; ``groups`` are the rows of each, in their order.

    All is worked out on the host and copied in one piece, so that nothing waits for the device.
    """
    sizes = tuple(sum(map(len, spans)) for spans in groups)
    places = max(sizes)
    rows = [span for spans in groups for span in spans]
    even = min(sizes) == places
    if even and _follow_each_other(rows, length):
        return RowOrder(None, None, None, sizes)

    def sorted_by_adapter() -> list[Tensor]:
        sorted_rows = numbers(rows)
        keep = numbers([range(n * places, n * places + size) for n, size in enumerate(sizes) if size])
        take = torch.zeros(len(groups) * places, dtype=torch.int64, device="cpu")
        take[keep] = sorted_rows
        return [take, sorted_rows, keep]

    take, sorted_rows, keep = on_device(device, sorted_by_adapter)
    return RowOrder(take, sorted_rows, None if even else keep, sizes)


def row_owners(groups: Mapping[int, Spans], rest: int, length: int, device: torch.device) -> Tensor:
    """Return the number of each row, shape ``(length,)``: its group's in ``groups``, or ``rest``."""
    owner = [rest] * length
    for number, spans in groups.items():
        for span in spans:
            owner[span.start : span.stop] = [number] * len(span)
    return on_device(device, lambda: [torch.tensor(owner, dtype=torch.int64, device="cpu")])[0]


def _follow_each_other(rows: Spans, length: int) -> bool:
    """Tell whether spans are those of a whole batch, one after the other."""
    starts = accumulate((len(span) for span in rows), initial=0)
    return all(span.start == start for span, start in zip(rows, starts, strict=False)) and sum(map(len, rows)) == length


def numbers(spans: Spans) -> Tensor:
    """Return the numbers in spans as a tensor on the host."""
    if sum(map(len, spans)) <= _LONG * len(spans):
        return torch.tensor([number for span in spans for number in span], dtype=torch.int64, device="cpu")
    return torch.cat([torch.arange(span.start, span.stop, device="cpu") for span in spans])


# A list of so many numbers takes as long to copy as a tensor of them to make.
_LONG = 16


def on_device(device: torch.device, make: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Make tensors on the host, and return them on a device, copied together."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        tensors = make()
        if device.type == "cpu" or not tensors:
            return tuple(tensors)
        return torch.split(torch.cat(list(tensors)).to(device), [len(tensor) for tensor in tensors])
    # What evaluation makes and keeps is there for training too, which cannot save an inference tensor.
    with torch.inference_mode(False):
        return on_device(device, make)
