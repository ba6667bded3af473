"""Low-rank factors ``U V`` of a matrix: the nearest of their rank (Eckart and Young 1936).

``U`` and ``V`` each take the root of the singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(
    matrix: Tensor, rank: float | None, scale: float = 1.0, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``U`` and ``V`` of which ``scale * U V`` is the matrix of rank ``rank`` nearest to ``matrix``.

    Args:
        matrix: shape ``(..., out, in)``.
        rank: of the product; the smallest that changes nothing beyond rounding when ``None``, and the smallest that
            holds a share of the sum of squares when it is that share, a float up to 1.0.
        scale: multiplies the product.
        size: of the numbers that ``matrix`` was computed from, shape ``(..., 1)``, where they may cancel out: rounding
            is relative to it.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        largest = float(values.amax()) if values.numel() else 0.0
        least = (largest if size is None else size) * torch.finfo(values.dtype).eps * max(matrix.shape[-2:])
        rank = max(int((values > least).sum(-1).max()), 1)
        values = values * (values > least)
    elif isinstance(rank, float):
        squares = values.double().square()
        held = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        rank = min(int((held < rank).sum(-1).max()) + 1, values.shape[-1])
    return balanced(left[..., :rank], values[..., :rank], right[..., :rank, :], scale)


def balanced(left: Tensor, values: Tensor, right: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return ``U`` and ``V`` with ``scale * U V = left diag(values) right``, the values shared evenly.

    Args:
        left: shape ``(..., out, r)``.
        values: shape ``(..., r)``, not negative.
        right: shape ``(..., r, in)``.
        scale: multiplies the product.
    """
    root = (values / scale).sqrt()
    return left * root.unsqueeze(-2), root.unsqueeze(-1) * right


def truncated_product(up: Tensor, down: Tensor, rank: float | None) -> tuple[Tensor, Tensor]:
    """Return the factors that :func:`truncated` gives for ``up @ down``, which is never formed.

    Args:
        up: shape ``(..., out, k)``.
        down: shape ``(..., k, in)``.
        rank: as for :func:`truncated`.
    """
    left, left_corner = torch.linalg.qr(up)
    right, right_corner = torch.linalg.qr(down.mT)
    size = (left_corner.norm(dim=(-2, -1)) * right_corner.norm(dim=(-2, -1))).unsqueeze(-1)
    small_up, small_down = truncated(left_corner @ right_corner.mT, rank, size=size)
    return left @ small_up, small_down @ right.mT
