"""The layout of a batch's rows in a layer's input, for not every layer sees them one after the other.

    rows first       (rows * k, ...)             most layers; a row's entries lie side by side
    sequence first   (tokens, rows * k, ...)     XLNet, FSMT, Longformer
    repeated         (copies, rows * k, ...)     all tokens once for each expert: Llama 4
    by images        (entries, ...)              the images of all rows, packed: a row has as many as it has images

It is found by comparing the layer's inputs of two passes in which one row of the model's input differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError


class Layout(NamedTuple):
    """The layout of the entries of a layer's input by rows.

    Attributes:
        dim: the dimension along which the rows lie.
        repeats: the number of times that all rows follow each other along it.
        images: True where a row has as many entries as it has images, not as many as any other.
    """

    dim: int = 0
    repeats: int = 1
    images: bool = False


ROWS = Layout()
# No layout is known: the entries are sorted by something else, or belong to no row.
UNKNOWN = Layout(dim=-1)


def spans(layout: Layout, length: int, shares: Sequence[int]) -> list[tuple[int, range]] | None:
    """Return rows and the entries of each, in order, of ``length`` entries; ``None`` where they cannot be divided so.

    Args:
        layout: of the entries.
        length: their number.
        shares: the rows' shares of them, as whole numbers.
    """
    inner, left = divmod(length, layout.repeats)
    total = sum(shares)
    if left or not total or any(inner * share % total for share in shares):
        return None
    stops = list(accumulate(inner * share // total for share in shares))
    starts = (0, *stops[:-1])
    return [
        (row, range(copy * inner + start, copy * inner + stop))
        for copy in range(layout.repeats)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def owners(layout: Layout, length: int, shares: Sequence[int]) -> list[int] | None:
    """Return the row of each of ``length`` entries; ``None`` where they cannot be divided so."""
    by_row = spans(layout, length, shares)
    return None if by_row is None else [row for row, span in by_row for _ in span]


def refused(layer: str) -> AdapterError:
    """Return the error for a layer in which the rows of a batch cannot use different adapters."""
    return AdapterError(
        f"{layer} does not see the rows of a batch one after the other, so they cannot use different adapters there.",
        hint=ONE_BY_ONE,
    )


ONE_BY_ONE = "Run the adapters one after the other: with model.using(name): model(...)."

# The fingerprints of one layer's inputs in one pass, a tensor a call, shape (first, second dimension, numbers).
Fingerprints = list[Tensor]
# An entry has changed if by more than this share of the largest change; rounding in fused experts does less.
CHANGED = 0.05
# Nothing has changed if no entry has by more than this share of itself.
LEAST = 1e-5


def layout_of(
    usual: Fingerprints, changed: Sequence[Fingerprints], rows: Sequence[int], shares: Sequence[int], images: bool
) -> Layout:
    """Return the one layout with which all calls of a layer agree, or ``UNKNOWN``.

    Args:
        usual: of one pass.
        changed: of passes in each of which one row of the model's input was another.
        rows: the number of that row in each of these passes.
        shares: the rows' shares of images; all the same without.
        images: True where the layer sees images, of which rows may have different numbers.
    """
    layouts: set[Layout] | None = None
    for index, before in enumerate(usual):
        others = [prints[index] for prints in changed if len(prints) == len(usual)]
        if len(others) < len(changed) or any(after.shape != before.shape for after in others):
            return UNKNOWN  # what it is given depends on the values: experts that get some of the tokens
        agreeing = set(_agreeing(before, others, rows, shares, images))
        layouts = agreeing if layouts is None else layouts & agreeing
    return layouts.pop() if layouts and len(layouts) == 1 else UNKNOWN


def _agreeing(
    before: Tensor, others: Sequence[Tensor], rows: Sequence[int], shares: Sequence[int], images: bool
) -> Iterator[Layout]:
    masks = _changed_entries(before, others)
    if not any(bool(mask.any()) for mask in masks):
        # The same for all rows, such as the types of tokens: one entry a row is proof enough.
        alike = before.shape[0] == len(shares) and len(set(shares)) == 1
        yield from [Layout(images=images)] if alike else []
        return
    for layout in _candidates(before.shape, len(shares), images):
        owner = owners(layout, before.shape[layout.dim], shares)
        if owner is not None and not any(
            bool(mask.transpose(0, layout.dim)[[own != row for own in owner]].any())
            for mask, row in zip(masks, rows, strict=True)
        ):
            yield layout


def _candidates(shape: torch.Size, rows: int, images: bool) -> Iterator[Layout]:
    if images:
        yield from (Layout(images=True), Layout(dim=1, images=True))
        return
    copies = shape[0] // rows
    yield from (Layout(repeats=repeats) for repeats in range(1, copies + 1) if shape[0] % (rows * repeats) == 0)
    yield Layout(dim=1)


def _changed_entries(before: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Return masks of the entries that differ, shape ``(first, second dimension)`` each."""
    sizes = [(before.norm(dim=-1) + after.norm(dim=-1)).clamp(min=TINY) for after in others]
    changes = [(before - after).norm(dim=-1) / size for after, size in zip(others, sizes, strict=True)]
    limit = max(LEAST, CHANGED * max((float(change.max()) for change in changes if change.numel()), default=0.0))
    return [change > limit for change in changes]


TINY = 1e-30


def differ(usual: Fingerprints, changed: Fingerprints) -> bool:
    """Tell whether a layer was given anything else."""
    if [x.shape for x in usual] != [x.shape for x in changed]:
        return True
    return any(bool(mask.any()) for x, y in zip(usual, changed, strict=True) for mask in _changed_entries(x, [y]))


def fingerprint(x: Tensor) -> Tensor:
    """Return a few numbers by which the entries of ``x`` along its first two dimensions can be told apart."""
    x = x.detach()
    values = x.float() if x.is_floating_point() else torch.stack([(x * 1.7).sin(), (x * 2.3).cos()], dim=-1)
    values = values.flatten(2) if values.ndim > 2 else values.reshape(len(x), 1, -1)
    generator = torch.Generator().manual_seed(0)
    if values.shape[-1] > _NUMBERS:
        mix = torch.randn(values.shape[-1], _NUMBERS, generator=generator).to(values.device)
        values = values @ mix
    return values


_NUMBERS = 8
