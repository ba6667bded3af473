"""One level of the inverse wavelet transform of a matrix (Mallat 1989, doi:10.1109/34.192463, section V)."""

from __future__ import annotations

import importlib
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import UnsupportedError


@lru_cache
def low_pass(family: str) -> tuple[float, ...]:
    """The low-pass filter of a family's synthesis, an even number of taps.

    Raises:
        UnsupportedError: it is not Haar's, and PyWavelets is not installed or does not know it.
    """
    if family == "db1":
        return (math.sqrt(0.5),) * 2
    try:
        return tuple(importlib.import_module("pywt").Wavelet(family).rec_lo)
    except ImportError as error:
        raise UnsupportedError(
            f"The filters of wavelet_family={family!r} come from the package PyWavelets, which is not installed.",
            hint="pip install 'veneer[wavelets]'.",
        ) from error
    except ValueError as error:
        raise UnsupportedError(
            f"wavelet_family={family!r} is no wavelet that PyWavelets knows.", hint='Use one such as "db4" or "sym3".'
        ) from error


def inverse(coefficients: Tensor, family: str) -> Tensor:
    """A matrix from its coefficients, ``(rows, columns)``, both even.

    The four quarters are the bands: top left low-low, top right high rows and low columns, bottom left the reverse,
    bottom right high-high. The result has ``taps - 2`` rows and columns fewer.
    """
    low = torch.tensor(low_pass(family), device=coefficients.device, dtype=coefficients.dtype)
    signs = torch.tensor([1.0, -1.0], device=low.device, dtype=low.dtype).repeat(len(low) // 2)
    high = low.flip(0) * signs
    filters = torch.stack([low.outer(low), high.outer(low), low.outer(high), high.outer(high)]).unsqueeze(1)
    top, bottom = coefficients.chunk(2, 0)
    bands = torch.stack([*top.chunk(2, 1), *bottom.chunk(2, 1)]).unsqueeze(0)
    full = F.conv_transpose2d(bands, filters, stride=2)[0, 0]
    cut = len(low) - 2
    return full[cut : full.shape[0] - cut, cut : full.shape[1] - cut]
