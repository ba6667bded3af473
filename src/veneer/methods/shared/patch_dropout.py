"""Dropout of parts of a patch: another patch stands in its place for one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from veneer.patches.multipliers import BlockDiagonal, Multiplier
from veneer.patches.patch import Patch

Drop = Callable[[Patch], Patch]


def of_delta(module: float, rows: float, rescale: bool) -> Drop | None:
    """Leave out all of ``U V`` or ``D`` in a share ``module`` of the steps, else a share ``rows`` of its rows.

    Args:
        module: from 0 to 1.
        rows: from 0 to 1.
        rescale: divide the rows that are kept by their share.
    """

    def drop(patch: Patch) -> Patch:
        if float(torch.rand(1)) < module:
            return Patch()
        if not rows:
            return patch
        if patch.up is not None:
            return replace(patch, up=_some_rows(patch.up, rows, rescale))
        operator = patch.operator
        assert operator is not None
        return replace(patch, dense=_some_rows(operator.dense(), rows, rescale))

    return drop if module or rows else None


def of_blocks(share: float) -> Drop | None:
    """Put the identity in the place of a ``share`` of the blocks of ``I``, at random."""
    return (lambda patch: replace(patch, inner=_some_blocks(patch.inner, share))) if share else None


def _some_rows(matrix: Tensor, share: float, rescale: bool) -> Tensor:
    mask = (torch.rand(matrix.shape[0], device=matrix.device) >= share).to(matrix.dtype)
    if rescale:
        mask = mask / mask.mean().clamp_min(1 / len(mask))
    return matrix * mask.unsqueeze(1)


def _some_blocks(factor: Multiplier | None, share: float) -> Multiplier | None:
    if not isinstance(factor, BlockDiagonal) or len(factor.blocks) == 1:
        return factor
    blocks = factor.blocks
    dropped = torch.randperm(len(blocks), device=blocks.device) < int(share * len(blocks))
    identity = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype)
    return BlockDiagonal(torch.where(dropped[:, None, None], identity, blocks))
