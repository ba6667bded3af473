"""The arithmetic of a low-rank update's products: exact, or in halves of bfloat16 at the speed of matrix units.

Matrix units multiply bfloat16 numbers and add in float32. A float32 factor is the sum of two bfloat16 halves, up to
2^-17 of its size, so that products with halves side by side are float32's to some 1e-5; a factor rounded to bfloat16
leaves 2e-3. On CUDA alone: benchmarks/notes.md, On a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class Products(Protocol):
    """Computes with activations and with factors, of which the factors are the more exact."""

    def activations(self, x: Tensor) -> Tensor:
        """Return activations in the dtype of the products."""

    def factor(self, factor: Tensor) -> Tensor:
        """Return a factor, or a product with one, in the dtype of the products."""

    def hidden(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return ``x @ factor``."""

    def gradient(self, hidden: Tensor, x: Tensor) -> Tensor:
        """Return ``hidden @ x``, whose rows are a factor's gradient."""

    def add(self, total: Tensor, hidden: Tensor, factor: Tensor, mask: Tensor | None = None) -> None:
        """Add ``hidden @ factor`` to ``total`` where ``mask`` is true, in place and rounded once."""


@dataclass(frozen=True)
class Exact:
    """Computes in one dtype, the wider of all; its products can be differentiated."""

    dtype: torch.dtype

    def activations(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def factor(self, factor: Tensor) -> Tensor:
        return factor.to(self.dtype)

    def hidden(self, x: Tensor, factor: Tensor) -> Tensor:
        return x @ factor

    def gradient(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden @ x

    def add(self, total: Tensor, hidden: Tensor, factor: Tensor, mask: Tensor | None = None) -> None:
        if mask is None and total.dtype is hidden.dtype:
            total.addmm_(hidden, factor)
        else:
            _add_masked(total, hidden @ factor, mask)


@dataclass(frozen=True)
class Split:
    """Computes with float32 factors as two halves of bfloat16, beside bfloat16 activations that stay as they are."""

    def activations(self, x: Tensor) -> Tensor:
        return x

    def factor(self, factor: Tensor) -> Tensor:
        return factor.float()

    def hidden(self, x: Tensor, factor: Tensor) -> Tensor:
        high, low = _wide_product(x, torch.cat(_halves(factor), 1)).chunk(2, 1)
        return high.add_(low)

    def gradient(self, hidden: Tensor, x: Tensor) -> Tensor:
        high, low = _wide_product(torch.cat(_halves(hidden), 0), x).chunk(2)
        return high.add_(low)

    def add(self, total: Tensor, hidden: Tensor, factor: Tensor, mask: Tensor | None = None) -> None:
        (high, low), (factor_high, factor_low) = _halves(hidden), _halves(factor)
        # The product of the two low halves is below what the sum of the others is rounded to.
        left, right = torch.cat([high, low, high], 1), torch.cat([factor_high, factor_high, factor_low], 0)
        if mask is None and total.dtype is left.dtype:
            total.addmm_(left, right)
        else:
            _add_masked(total, _wide_product(left, right), mask)


def products(x: Tensor, dtype: torch.dtype) -> Products:
    """Return the arithmetic for activations ``x`` and factors whose common dtype is ``dtype``."""
    splits = dtype is torch.float32 and x.dtype is torch.bfloat16 and _has_wide_products(x.device)
    return Split() if splits else Exact(dtype)


@cache
def _has_wide_products(device: torch.device) -> bool:
    """Tell whether a device gives products of bfloat16 in float32, as torch has them since 2.8 for CUDA."""
    if device.type != "cuda":
        return False
    few = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return _wide_product(few, few).dtype is torch.float32
    except (RuntimeError, TypeError):
        return False


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return product


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return two bfloat16 tensors whose sum is a float32 tensor, up to 2^-17 of each value."""
    high = factor.to(torch.bfloat16)
    return high, (factor - high).to(torch.bfloat16)


def _add_masked(total: Tensor, product: Tensor, mask: Tensor | None) -> None:
    total.add_(product if mask is None else product.mul_(mask))
