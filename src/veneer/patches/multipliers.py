"""Multipliers: the square matrices of a patch, ``I`` on a weight's input side and ``O`` on its output side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.patches.watched_parameters import detached

# A multiplier this near to the identity is one.
ROUNDING = 1e-6


class Multiplier(ABC):
    """A square matrix ``M``, in a form cheaper than a matrix where it has one.

    Attributes:
        is_diagonal: whether it scales each entry on its own.
    """

    is_diagonal: ClassVar[bool] = False

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of its values."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return ``M x`` along the last dimension of ``x``, in the wider of the dtypes."""

    @abstractmethod
    def rows(self, weight: Tensor) -> Tensor:
        """Return ``weight M`` for rows ``(n, size)`` of a weight."""

    def left_rows(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Return the rows ``start:stop`` of ``M W`` from those of ``W``; all of them unless :attr:`is_diagonal`."""
        return self.apply(weight.mT).mT

    @abstractmethod
    def at(self, index: int) -> Multiplier:
        """Return the multiplier of one matrix of a stack."""

    @abstractmethod
    def changes(self) -> bool:
        """Tell whether it is, beyond rounding, anything but the identity."""


@dataclass(frozen=True)
class Diagonal(Multiplier):
    """A diagonal matrix; ``values`` has shape ``(size,)``."""

    is_diagonal = True
    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def apply(self, x: Tensor) -> Tensor:
        # Not converted first: autograd would keep the conversion in the place of ``x``.
        return x * self.values

    def rows(self, weight: Tensor) -> Tensor:
        return weight * self.values.to(weight.dtype)

    def left_rows(self, weight: Tensor, start: int, stop: int) -> Tensor:
        return weight * self.values[..., start:stop, None].to(weight.dtype)

    def at(self, index: int) -> Diagonal:
        return Diagonal(self.values[index])

    def changes(self) -> bool:
        return bool((detached(self.values).float() - 1).abs().max() > ROUNDING)


@dataclass(frozen=True)
class BlockDiagonal(Multiplier):
    """A block-diagonal matrix; ``blocks`` has shape ``(n, size, size)``, or ``(1, size, size)`` when all are one."""

    blocks: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    def apply(self, x: Tensor) -> Tensor:
        x = _widened(x, self.dtype)
        parts = x.unflatten(-1, (-1, self.blocks.shape[-1]))
        return torch.einsum("...ni,nji->...nj", parts, self._spread(parts).to(x.dtype)).flatten(-2)

    def rows(self, weight: Tensor) -> Tensor:
        parts = weight.unflatten(-1, (-1, self.blocks.shape[-1]))
        return torch.einsum("...nj,nji->...ni", parts, self._spread(parts).to(weight.dtype)).flatten(-2)

    def _spread(self, parts: Tensor) -> Tensor:
        return self.blocks.expand(parts.shape[-2], -1, -1)

    def at(self, index: int) -> BlockDiagonal:
        return BlockDiagonal(self.blocks[index])

    def changes(self) -> bool:
        return _differs(self.blocks)


@dataclass(frozen=True)
class FullMatrix(Multiplier):
    """A full matrix, shape ``(size, size)``."""

    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def apply(self, x: Tensor) -> Tensor:
        x = _widened(x, self.dtype)
        return torch.nn.functional.linear(x, self.values.to(x.dtype))

    def rows(self, weight: Tensor) -> Tensor:
        return weight @ self.values.to(weight.dtype)

    def at(self, index: int) -> FullMatrix:
        return FullMatrix(self.values[index])

    def changes(self) -> bool:
        return _differs(self.values)


@dataclass(frozen=True)
class IdentityPlusLowRank(Multiplier):
    """``1 + P Q`` with few columns: ``left`` is ``P``, shape ``(size, r)``, and ``right`` is ``Q``, ``(r, size)``."""

    left: Tensor
    right: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    def apply(self, x: Tensor) -> Tensor:
        x = _widened(x, self.dtype)
        return x + (x @ self.right.to(x.dtype).mT) @ self.left.to(x.dtype).mT

    def rows(self, weight: Tensor) -> Tensor:
        return weight + (weight @ self.left.to(weight.dtype)) @ self.right.to(weight.dtype)

    def at(self, index: int) -> IdentityPlusLowRank:
        return IdentityPlusLowRank(self.left[index], self.right[index])

    def changes(self) -> bool:
        return bool((detached(self.left).float() @ detached(self.right).float()).abs().max() > ROUNDING)


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(torch.promote_types(x.dtype, dtype))


def _differs(matrices: Tensor) -> bool:
    identity = torch.eye(matrices.shape[-1], device=matrices.device)
    return bool((detached(matrices).float() - identity).abs().max() > ROUNDING)
