"""Merging a matrix a block of rows at a time, in memory that serves every block: new memory costs more than sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veneer.merging.work.rounding import Rounder, RoundingTally
from veneer.patches.patch import Patch
from veneer.patches.weight_arithmetic import added_square, changed_into

# Values that are worked on at a time: a megabyte in float32, about what a core's cache holds.
BLOCK_VALUES = 1 << 18


class BlockMerge:
    """Merges one matrix, or the matrices of a stack one after the other, and counts what that does to it.

    Args:
        rows: of a matrix.
        columns: of a matrix.
        dtype: of the result.
        rounder: rounds to it.
        by_rows: whether a block of rows changes without knowledge of the others; else all rows are one block.

    Attributes:
        step: rows of a block.
        tally: what was counted.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, rounder: Rounder, by_rows: bool = True) -> None:
        self.rows, self.rounder, self.tally = rows, rounder, RoundingTally()
        self.step = max(1, min(rows, BLOCK_VALUES // max(columns, 1))) if by_rows else max(1, rows)
        self._after, self._scratch = torch.empty((2, self.step, columns))
        self._rounded = torch.empty((self.step, columns), dtype=dtype)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first row and the end of each block."""
        for start in range(0, self.rows, self.step):
            yield start, min(start + self.step, self.rows)

    def begin(self, patches: Sequence[Patch]) -> None:
        """Begin a matrix, which ``patches`` change."""
        # The change of a float32 result is counted value by value: no rounding error would tell of an infinity in it.
        known = added_square(patches) if self._rounded.dtype != torch.float32 else None
        self.tally.change += known or 0.0
        self._patches, self._is_counted = patches, known is not None

    @torch.no_grad()
    def merge(self, before: Tensor, start: int) -> Tensor:
        """One block's merged rows, from the base's, whose first is ``start``; the next call rewrites them."""
        count = before.shape[0]
        scratch = self._scratch[:count]
        after = changed_into(self._after[:count], before, self._patches, start, start + count)
        rounded = self.rounder(after, self._rounded.dtype, self._rounded[:count])
        if not self._is_counted:
            self.tally.add_change(before, after, scratch)
        self.tally.add_error(after, rounded, scratch)
        return rounded
