"""Matrices ``D`` that a patch adds to a weight, in forms that are applied to an input without being made."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


class LinearOperator(ABC):
    """A matrix ``(out, in)`` of a linear layer, made whole only where it is merged."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``D x`` along the last dimension of ``x``, in float32 or what is wider."""

    @abstractmethod
    def whole(self) -> Tensor:
        """The matrix itself."""

    @abstractmethod
    def times(self, factor: float) -> LinearOperator:
        """The same matrix, each entry ``factor`` times as large."""

    @abstractmethod
    def changes(self) -> bool:
        """Whether it is anything but zero."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes of its own."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, (Tensor, LinearOperator)))

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows ``start:stop``."""
        return self._made[start:stop]

    @cached_property
    def _made(self) -> Tensor:
        # A merge asks block by block.
        return self.whole()


def as_dense(matrix: Tensor | LinearOperator) -> Tensor:
    """The matrix itself, in whichever form it is."""
    return matrix.whole() if isinstance(matrix, LinearOperator) else matrix


def _wide(x: Tensor) -> Tensor:
    """``x`` in a dtype that products are exact and, of this size, quick in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True)
class Kronecker(LinearOperator):
    """``kron(first, second)`` with ``first``: (a, c), ``second``: (b, d), a * b = out and c * d = in."""

    first: Tensor
    second: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.second.dtype

    def apply(self, x: Tensor) -> Tensor:
        x = _wide(x)
        parts = x.unflatten(-1, (self.first.shape[1], self.second.shape[1]))
        found: Tensor = self.first.to(x.dtype) @ (parts @ self.second.to(x.dtype).mT)
        return found.flatten(-2)

    def whole(self) -> Tensor:
        return torch.kron(self.first, self.second.contiguous())

    def times(self, factor: float) -> Kronecker:
        return replace(self, first=self.first * factor)

    def changes(self) -> bool:
        return bool(self.first.count_nonzero()) and bool(self.second.count_nonzero())


@dataclass(frozen=True)
class Circulant(LinearOperator):
    """Circulant blocks: entry ``[m s + j, n s + i]`` is ``kernel[m, n, (i - j) mod s]``; kernel: (out / s, in / s, s).

    Each block is a correlation, which is a product in the Fourier domain.
    """

    kernel: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    @cached_property
    def _spectrum(self) -> Tensor:
        """Shape ``(frequencies, in / s, out / s)``."""
        found: Tensor = torch.fft.rfft(_wide(self.kernel)).conj().permute(2, 1, 0)
        return found.resolve_conj().contiguous()

    def apply(self, x: Tensor) -> Tensor:
        size = self.kernel.shape[2]
        parts = _wide(x).reshape(-1, self.kernel.shape[1], size)
        seen = torch.fft.rfft(parts).permute(2, 0, 1)  # (frequencies, rows, in / s)
        found: Tensor = torch.fft.irfft((seen @ self._spectrum).permute(1, 2, 0), n=size)
        return found.flatten(1).view(*x.shape[:-1], -1)

    def whole(self) -> Tensor:
        size = self.kernel.shape[2]
        step = torch.arange(size, device=self.kernel.device)
        blocks = self.kernel[:, :, (step - step.unsqueeze(1)) % size]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)

    def times(self, factor: float) -> Circulant:
        return Circulant(self.kernel * factor)

    def changes(self) -> bool:
        return bool(self.kernel.count_nonzero())


@dataclass(frozen=True)
class Sparse(LinearOperator):
    """``values`` at ``row`` and ``column``, each of shape ``(n,)``, in a matrix of ``shape``; indices are int32.

    Several at one place add up.
    """

    values: Tensor
    row: Tensor
    column: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def apply(self, x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(*self.apply(torch.stack([x.real, x.imag])).unbind())
        flat = _wide(x).reshape(-1, self.shape[1])
        wants_grad = torch.is_grad_enabled() and (self.values.requires_grad or x.requires_grad)
        if wants_grad or torch.compiler.is_compiling():
            found = flat @ self.whole().to(flat.dtype).mT
        else:
            found = (self._compressed.to(flat.dtype) @ flat.mT).mT
        return found.reshape(*x.shape[:-1], -1)

    @cached_property
    def _compressed(self) -> Tensor:
        """By rows, the form that multiplies fastest; made on first use."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            places = torch.stack([self.row, self.column])
            values = _wide(self.values.detach())
            entries = torch.sparse_coo_tensor(places, values, self.shape, check_invariants=True)
            return entries.to_sparse_csr()

    @property
    def nbytes(self) -> int:
        return 2 * (self.values.nbytes + self.row.nbytes + self.column.nbytes)

    def whole(self) -> Tensor:
        empty = self.values.new_zeros(self.shape[0] * self.shape[1])
        return empty.index_add(0, self.row.long() * self.shape[1] + self.column, self.values).view(self.shape)

    def times(self, factor: float) -> Sparse:
        return replace(self, values=self.values * factor)

    def changes(self) -> bool:
        return bool(self.values.count_nonzero())


@dataclass(frozen=True)
class SparseInTransform(LinearOperator):
    """A sparse matrix between two linear maps: ``outer(S inner(x))``.

    Attributes:
        sparse: ``S``.
        inner: acts on the last dimension of an input.
        outer: acts on the last dimension of what ``S`` gives.
        matrix: the whole matrix that is meant for an ``S`` made whole.
    """

    sparse: Sparse
    inner: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor], Tensor]
    matrix: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.sparse.dtype

    def apply(self, x: Tensor) -> Tensor:
        return self.outer(self.sparse.apply(self.inner(_wide(x))))

    def whole(self) -> Tensor:
        return self.matrix(self.sparse.whole())

    def times(self, factor: float) -> SparseInTransform:
        return replace(self, sparse=self.sparse.times(factor))

    def changes(self) -> bool:
        return self.sparse.changes()


@dataclass(frozen=True)
class HadamardLowRank(LinearOperator):
    """``weight * (up @ down)``, entry by entry, of a base's ``weight``: (out, in), ``up``: (out, r), ``down``: (r, in).

    Few rows of an input are served by r products with the weight itself, many by the matrix.
    """

    weight: Tensor
    up: Tensor
    down: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def apply(self, x: Tensor) -> Tensor:
        flat = _wide(x).reshape(-1, x.shape[-1])
        if len(flat) > _FEW_ROWS:
            return F.linear(flat, self.whole().to(flat.dtype)).view(*x.shape[:-1], -1)
        scaled = flat.unsqueeze(1) * self.down.to(flat.dtype)  # (rows, r, in)
        found = F.linear(scaled, self.weight.to(flat.dtype)) * self.up.mT.to(flat.dtype)
        return found.sum(1).view(*x.shape[:-1], -1)

    def whole(self) -> Tensor:
        return self.rows(0, len(self.weight))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop].to(self.dtype) * (self.up[start:stop] @ self.down)

    def times(self, factor: float) -> HadamardLowRank:
        return replace(self, up=self.up * factor)

    def changes(self) -> bool:
        return bool(self.up.count_nonzero()) and bool(self.down.count_nonzero())


# From here on the matrix is cheaper.
_FEW_ROWS = 2
