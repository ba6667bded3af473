"""One level of the inverse wavelet transform (Mallat 1989, doi:10.1109/34.192463, section V), whole or applied."""

from __future__ import annotations

import importlib
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import UnsupportedError
from veneer.packages import require
from veneer.patches.operators import Sparse, SparseInTransform


@lru_cache
def low_pass(family: str) -> tuple[float, ...]:
    """Return the low-pass filter of a family's synthesis, an even number of taps.

    Raises:
        UnsupportedError: it is not Haar's, and PyWavelets is not installed or does not know it.
    """
    if family == "db1":
        return (math.sqrt(0.5),) * 2
    require(f"wavelet_family={family!r}", "PyWavelets", extra="wavelets")
    try:
        return tuple(importlib.import_module("pywt").Wavelet(family).rec_lo)
    except ValueError as error:
        raise UnsupportedError(
            f"wavelet_family={family!r} is no wavelet that PyWavelets knows.", hint='Use one such as "db4" or "sym3".'
        ) from error


def between(sparse: Sparse, border: tuple[int, int, int, int], family: str) -> SparseInTransform:
    """Return the matrix whose coefficients are ``sparse``, with zeros left, right, above and below as ``border`` says.

    Each band's filters are products of one along the rows and one along the columns, so that an input meets two
    short filters, the coefficients, and two short filters again.
    """
    left, right, above, below = border
    rows, columns = sparse.shape
    half_rows, half_columns = (rows + above + below) // 2, (columns + left + right) // 2
    row, column = sparse.row + above, sparse.column + left
    lower, righter = (row >= half_rows).int(), (column >= half_columns).int()
    # The right half is high along the rows, the lower one along the columns: see ``inverse``.
    inside = Sparse(
        sparse.values,
        righter * half_rows + row % half_rows,
        lower * half_columns + column % half_columns,
        (2 * half_rows, 2 * half_columns),
    )
    filters = _filters(family, sparse.values)

    def inner(x: Tensor) -> Tensor:
        padded = F.pad(x.reshape(-1, 1, columns), (_cut(family), 2 * half_columns - columns))
        return F.conv1d(padded, filters.to(x.dtype), stride=2).view(*x.shape[:-1], -1)

    def outer(y: Tensor) -> Tensor:
        bands = y.reshape(-1, 2, half_rows)
        full = F.conv_transpose1d(bands, filters.to(y.dtype), stride=2)[:, 0, _cut(family) :]
        return full[:, :rows].reshape(*y.shape[:-1], -1)

    def matrix(_: Tensor) -> Tensor:
        return inverse(F.pad(sparse.dense(), border), family)[:rows, :columns]

    return SparseInTransform(inside, inner, outer, matrix)


def _cut(family: str) -> int:
    """Return the number of entries of the synthesis that are its border."""
    return len(low_pass(family)) - 2


def _filters(family: str, like: Tensor) -> Tensor:
    """Return the low-pass and the high-pass filter of the synthesis, shape ``(2, 1, taps)``."""
    low = torch.tensor(low_pass(family), device=like.device, dtype=like.dtype)
    signs = torch.tensor([1.0, -1.0], device=low.device, dtype=low.dtype).repeat(len(low) // 2)
    return torch.stack([low, low.flip(0) * signs]).unsqueeze(1)


def inverse(coefficients: Tensor, family: str) -> Tensor:
    """Return a matrix from its coefficients, ``(rows, columns)``, both even.

    The four quarters are the bands: top left low-low, top right high rows and low columns, bottom left the reverse,
    bottom right high-high. The result has ``taps - 2`` rows and columns fewer.
    """
    low, high = _filters(family, coefficients).squeeze(1)
    filters = torch.stack([low.outer(low), high.outer(low), low.outer(high), high.outer(high)]).unsqueeze(1)
    top, bottom = coefficients.chunk(2, 0)
    bands = torch.stack([*top.chunk(2, 1), *bottom.chunk(2, 1)]).unsqueeze(0)
    full = F.conv_transpose2d(bands, filters, stride=2)[0, 0]
    cut = _cut(family)
    return full[cut : full.shape[0] - cut, cut : full.shape[1] - cut]
