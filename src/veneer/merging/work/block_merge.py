"""Merges matrices a block of rows at a time, in memory that serves every block: new memory costs more than sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.merging.work.rounding import Rounder, RoundingTally
from veneer.patches.patch import Patch
from veneer.patches.weight_arithmetic import added_square, changed_into, patches_by_matrix, row_blocks

# Values of a block: a megabyte in float32, about the size of a core's cache.
BLOCK_VALUES = 1 << 18


class BlockMerge:
    """Merges one matrix, or the matrices of a stack one after the other, and measures the change and the rounding.

    Args:
        rows: of a matrix.
        columns: of a matrix.
        dtype: of the result.
        rounder: rounds to it.
        by_rows: whether a block of rows changes without knowledge of the others; else all rows are one block.

    Attributes:
        step: rows of a block.
        tally: the sums that are measured.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, rounder: Rounder, by_rows: bool = True) -> None:
        self.rows, self.rounder, self.tally = rows, rounder, RoundingTally()
        self.step = max(1, min(rows, BLOCK_VALUES // max(columns, 1))) if by_rows else max(1, rows)
        self._after, self._scratch = torch.empty((2, self.step, columns))
        self._rounded = torch.empty((self.step, columns), dtype=dtype)

    def run(
        self,
        weight: Tensor,
        patches: Sequence[Patch],
        read: Callable[[int, int, int], Tensor],
        write: Callable[[int, int, int, Tensor], None],
    ) -> None:
        """Merge the matrices of a canonical weight, block by block.

        Args:
            weight: tells how many there are.
            patches: change the weight.
            read: returns the base's rows of a block: of a matrix's index, from a first row to an end.
            write: takes the same place, and the block's merged rows, which the next block rewrites.
        """
        for index, own_patches in enumerate(patches_by_matrix(weight, patches)):
            self._begin(own_patches)
            for start, stop in row_blocks(self.rows, self.step):
                write(index, start, stop, self._merge(read(index, start, stop), start))

    def _begin(self, patches: Sequence[Patch]) -> None:
        # The change of a float32 result is counted value by value: no rounding error would tell of an infinity in it.
        known = added_square(patches) if self._rounded.dtype != torch.float32 else None
        self.tally.change += known or 0.0
        self._patches, self._is_counted = patches, known is not None

    @torch.no_grad()
    def _merge(self, before: Tensor, start: int) -> Tensor:
        count = before.shape[0]
        scratch = self._scratch[:count]
        after = changed_into(self._after[:count], before, self._patches, start, start + count)
        rounded = self.rounder(after, self._rounded.dtype, self._rounded[:count])
        if not self._is_counted:
            self.tally.add_change(before, after, scratch)
        self.tally.add_error(after, rounded, scratch)
        return rounded
