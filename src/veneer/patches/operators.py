"""Linear operators: the matrices ``D`` that patches add to a weight, applied to an input without building them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.patches.layer_form import LayerForm
from veneer.patches.watched_parameters import detached

# The rows of an input for which HadamardLowRank needs no matrix; with more the matrix is cheaper.
_FEW_ROWS = 2


class LinearOperator(ABC):
    """A matrix ``(out, in)`` of a layer, built only where it is merged."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of its values."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return ``D x`` along the last dimension of ``x``, in float32 or what is wider."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the matrix itself."""

    @abstractmethod
    def scaled(self, factor: float) -> LinearOperator:
        """Return the same matrix, each entry ``factor`` times as large."""

    @abstractmethod
    def changes(self) -> bool:
        """Tell whether it is anything but zero."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes of its own."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, (Tensor, LinearOperator)))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start:stop``."""
        return self._built[start:stop]

    @cached_property
    def _built(self) -> Tensor:
        # A merge asks block by block.
        return self.dense()

    def output(self, x: Tensor, site: LayerForm, dtype: torch.dtype) -> Tensor:
        """Return what it adds to a layer's output for the input ``x``.

        Args:
            x: in ``dtype``, or token ids.
            site: the layer.
            dtype: to compute in; an operator may take a wider one.
        """
        return self.apply(x)

    def at(self, index: int) -> LinearOperator:
        """Return the operator of one matrix of a stack."""
        return DenseMatrix(self.dense()[index])


@dataclass(frozen=True)
class DenseMatrix(LinearOperator):
    """A matrix that is built already; of any kind of layer, and with a leading dimension for a stack of them."""

    matrix: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def apply(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        return F.linear(wide, self.matrix.to(wide.dtype))

    def dense(self) -> Tensor:
        return self.matrix

    def scaled(self, factor: float) -> DenseMatrix:
        return DenseMatrix(self.matrix * factor)

    def changes(self) -> bool:
        return bool(self.matrix.count_nonzero())

    def rows(self, start: int, stop: int) -> Tensor:
        return self.matrix[..., start:stop, :]

    def output(self, x: Tensor, site: LayerForm, dtype: torch.dtype) -> Tensor:
        return site.product(x, self.matrix.to(dtype))


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in a dtype whose products are exact and, at this size, quick."""
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
        product: Tensor = self.first.to(x.dtype) @ (parts @ self.second.to(x.dtype).mT)
        return product.flatten(-2)

    def dense(self) -> Tensor:
        return torch.kron(self.first, self.second.contiguous())

    def scaled(self, factor: float) -> Kronecker:
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
        """The kernel's Fourier transform, shape ``(frequencies, in / s, out / s)``."""
        spectrum: Tensor = torch.fft.rfft(_wide(self.kernel)).conj().permute(2, 1, 0)
        return spectrum.resolve_conj().contiguous()

    def apply(self, x: Tensor) -> Tensor:
        size = self.kernel.shape[2]
        parts = _wide(x).reshape(-1, self.kernel.shape[1], size)
        transformed = torch.fft.rfft(parts).permute(2, 0, 1)  # (frequencies, rows, in / s)
        product: Tensor = torch.fft.irfft((transformed @ self._spectrum).permute(1, 2, 0), n=size)
        return product.flatten(1).view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        size = self.kernel.shape[2]
        step = torch.arange(size, device=self.kernel.device)
        blocks = self.kernel[:, :, (step - step.unsqueeze(1)) % size]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)

    def scaled(self, factor: float) -> Circulant:
        return Circulant(self.kernel * factor)

    def changes(self) -> bool:
        return bool(self.kernel.count_nonzero())


@dataclass(frozen=True)
class Sparse(LinearOperator):
    """``values`` at ``row`` and ``column``, each of shape ``(n,)``, in a matrix of ``shape``; indices are int32.

    Several values at one place add up.
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
            product = flat @ self.dense().to(flat.dtype).mT
        else:
            product = (self._compressed.to(flat.dtype) @ flat.mT).mT
        return product.reshape(*x.shape[:-1], -1)

    @cached_property
    def _compressed(self) -> Tensor:
        """The matrix compressed by rows, the form that multiplies fastest."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            places = torch.stack([self.row, self.column])
            values = _wide(detached(self.values))
            entries = torch.sparse_coo_tensor(places, values, self.shape, check_invariants=True)
            return entries.to_sparse_csr()

    @property
    def nbytes(self) -> int:
        return 2 * (self.values.nbytes + self.row.nbytes + self.column.nbytes)

    def dense(self) -> Tensor:
        empty = self.values.new_zeros(self.shape[0] * self.shape[1])
        return empty.index_add(0, self.row.long() * self.shape[1] + self.column, self.values).view(self.shape)

    def scaled(self, factor: float) -> Sparse:
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
        matrix: gives the whole matrix for a dense ``S``.
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

    def dense(self) -> Tensor:
        return self.matrix(self.sparse.dense())

    def scaled(self, factor: float) -> SparseInTransform:
        return replace(self, sparse=self.sparse.scaled(factor))

    def changes(self) -> bool:
        return self.sparse.changes()


@dataclass(frozen=True)
class HadamardLowRank(LinearOperator):
    """``weight * (up @ down)``, entry by entry, of a base's ``weight``: (out, in), ``up``: (out, r), ``down``: (r, in).

    Few rows of an input take r products with the weight itself, many take the matrix.
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
            return F.linear(flat, self.dense().to(flat.dtype)).view(*x.shape[:-1], -1)
        scaled = flat.unsqueeze(1) * self.down.to(flat.dtype)  # (rows, r, in)
        products = F.linear(scaled, self.weight.to(flat.dtype)) * self.up.mT.to(flat.dtype)
        return products.sum(1).view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        return self.rows(0, len(self.weight))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop].to(self.dtype) * (self.up[start:stop] @ self.down)

    def scaled(self, factor: float) -> HadamardLowRank:
        return replace(self, up=self.up * factor)

    def changes(self) -> bool:
        return bool(self.up.count_nonzero()) and bool(self.down.count_nonzero())
