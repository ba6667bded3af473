"""The rows of a batch sorted by adapter, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# A product of its own takes an adapter's rows about as long as so many rows more in the batched one;
# benchmarks/notes.md, "The rows of a server's batch".
_ALONE = 8


@dataclass(frozen=True)
class RowOrder:
    """Rows sorted by adapter: those of most adapters in as many places for each, those of long ones by themselves.

    Attributes:
        sizes: the number of rows of each adapter.
        rows: the rows that name an adapter, sorted by adapter, those by themselves last; ``None`` when all rows do and
            lie so already, as many for each.
        take: the row that is put in each place, ``(adapters * places,)``; ``None`` where there are no places.
        keep: the places of rows; ``None`` when every place is a row's.
        alone: the number of an adapter, and its rows, for each whose rows are by themselves.
    """

    sizes: tuple[int, ...]
    rows: Tensor | None = None
    take: Tensor | None = None
    keep: Tensor | None = None
    alone: Sequence[tuple[int, Tensor]] = ()


Spans = Sequence[range]


def row_order(groups: Sequence[Spans], length: int, device: torch.device) -> RowOrder:
    """Sort a batch of ``length`` rows by adapter; ``groups`` are the rows of each, in their order.

    All is worked out on the host and copied in one piece, so that nothing waits for the device.
    """
    sizes = tuple(sum(map(len, spans)) for spans in groups)
    if min(sizes) == max(sizes) and _follow_each_other([span for spans in groups for span in spans], length):
        return RowOrder(sizes)
    places = _places(sizes)
    alone = [number for number, size in enumerate(sizes) if size > places]
    together = [number for number, size in enumerate(sizes) if 0 < size <= places]
    is_full = sum(sizes[number] for number in together) == places * len(sizes)

    def sorted_by_adapter() -> list[Tensor]:
        rows = numbers([span for number in together for span in groups[number]])
        keep = numbers([range(number * places, number * places + sizes[number]) for number in together])
        take = torch.zeros(len(groups) * places, dtype=torch.int64, device="cpu")
        take[keep] = rows
        by_themselves = [numbers(groups[number]) for number in alone]
        return [torch.cat([rows, *by_themselves]), take, keep, *by_themselves]

    rows, take, keep, *by_themselves = on_device(device, sorted_by_adapter)
    return RowOrder(
        sizes,
        rows,
        take if places else None,
        None if is_full else keep,
        tuple(zip(alone, by_themselves, strict=True)),
    )


def _places(sizes: Sequence[int]) -> int:
    """Return how many places each adapter has in the batched product, so that all rows take least time.

    Padding makes no more than twice as many of the rows that are in it.
    """
    best, least = 0, sum(sizes) + _ALONE * sum(map(bool, sizes))
    for places in {*sizes} - {0}:
        inside = [size for size in sizes if size <= places]
        outside = [size for size in sizes if size > places]
        time = places * len(sizes) + sum(outside) + _ALONE * len(outside)
        if time <= least and places * len(sizes) <= 2 * sum(inside):
            best, least = places, time
    return best


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
