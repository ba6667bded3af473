"""The rows of a batch sorted by adapter, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Another batched product takes about as long as so many rows more in one, and copying an adapter's factors for it as so
# many; benchmarks/notes.md, "The rows of a server's batch".
_PRODUCT, _GATHERING = 32, 4


@dataclass(frozen=True)
class RowBlock:
    """The rows of some adapters, with as many places for each as the one with the most has rows.

    Attributes:
        adapters: their numbers; ``None`` for all adapters, those without rows and of other blocks too.
        numbers: the same as a tensor; empty for all.
        take: the row that is put in each place, ``(adapters * places,)``.
        keep: the places of rows; ``None`` when every place is a row's.
    """

    adapters: tuple[int, ...] | None
    numbers: Tensor
    take: Tensor
    keep: Tensor | None


@dataclass(frozen=True)
class RowOrder:
    """Rows sorted by adapter, in blocks that are computed by one batched product each.

    Attributes:
        sizes: the number of rows of each adapter.
        rows: the rows that name an adapter, block by block and sorted by adapter; ``None`` when all rows do and lie so
            already, as many for each.
        blocks: adapters with similarly many rows.
    """

    sizes: tuple[int, ...]
    rows: Tensor | None = None
    blocks: Sequence[RowBlock] = ()


Spans = Sequence[range]


def row_order(groups: Sequence[Spans], length: int, device: torch.device) -> RowOrder:
    """Sort a batch of ``length`` rows by adapter; ``groups`` are the rows of each, in their order.

    All is worked out on the host and copied in one piece, so that nothing waits for the device.
    """
    sizes = tuple(sum(map(len, spans)) for spans in groups)
    if min(sizes) == max(sizes) and _follow_each_other([span for spans in groups for span in spans], length):
        return RowOrder(sizes)
    parts = _parts(sizes)

    def sorted_by_adapter() -> list[Tensor]:
        tensors = []
        for part in parts:
            rows = numbers([span for number in part.inside for span in groups[number]])
            first = {number: place * part.places for place, number in enumerate(part.adapters or range(len(sizes)))}
            keep = numbers([range(first[number], first[number] + sizes[number]) for number in part.inside])
            take = torch.zeros(len(first) * part.places, dtype=torch.int64, device="cpu")
            take[keep] = rows
            tensors += [torch.tensor(part.adapters or (), dtype=torch.int64, device="cpu"), take, keep, rows]
        return tensors

    tensors = on_device(device, sorted_by_adapter)
    blocks = [
        RowBlock(part.adapters, own, take, None if len(take) == len(keep) else keep)
        for part, own, take, keep in zip(parts, *(tensors[place::4] for place in range(3)), strict=True)
    ]
    return RowOrder(sizes, torch.cat(tensors[3::4]) if parts else None, blocks)


@dataclass(frozen=True)
class _BlockPlan:
    """The adapters of a block, ``None`` for all; those among them that have rows there; and the places for each."""

    adapters: tuple[int, ...] | None
    inside: Sequence[int]
    places: int

    def time(self, count: int) -> int:
        """The time that it takes in a batch of ``count`` adapters, in rows."""
        if self.adapters is None:
            return count * self.places + _PRODUCT
        return len(self.adapters) * (self.places + _GATHERING) + _PRODUCT


def _parts(sizes: Sequence[int]) -> Sequence[_BlockPlan]:
    """Return the blocks that take least time; padding makes no more than twice as many rows of one."""
    choices = []
    for most in sorted({0, *sizes}):
        inside = [number for number, size in enumerate(sizes) if 0 < size <= most]
        if len(sizes) * most <= 2 * sum(sizes[number] for number in inside):
            others = _of_similar_size([number for number, size in enumerate(sizes) if size > most], sizes)
            choices.append([*([_BlockPlan(None, inside, most)] if inside else []), *others])
    return min(choices, key=lambda parts: sum(part.time(len(sizes)) for part in parts))


def _of_similar_size(adapters: Sequence[int], sizes: Sequence[int]) -> list[_BlockPlan]:
    """Return blocks of adapters none of which has less than half the rows of another."""
    blocks: list[list[int]] = []
    for number in sorted(adapters, key=sizes.__getitem__, reverse=True):
        if not blocks or 2 * sizes[number] < sizes[blocks[-1][0]]:
            blocks.append([])
        blocks[-1].append(number)
    return [_BlockPlan(tuple(block), block, sizes[block[0]]) for block in blocks]


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
