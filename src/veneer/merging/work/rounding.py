"""Rounds float32 to the dtype of the output: to the nearest value, or at random between the two nearest."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import UsageError

NEAREST = "nearest"
STOCHASTIC = "stochastic"


@dataclass(frozen=True)
class Rounding:
    """The way in which values are rounded.

    Attributes:
        kind: ``"nearest"`` (ties to even) or ``"stochastic"``: up or down with the probability that makes the
            expected value exact, so that small changes survive on average (Gupta et al. 2015, arXiv:1502.02551).
        seed: of the random choices; a tensor's choices depend on it and on the tensor's name alone.
    """

    kind: str = NEAREST
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (NEAREST, STOCHASTIC):
            raise UsageError(f"rounding={self.kind!r} is unknown.", hint=f"Known: {NEAREST}, {STOCHASTIC}.")

    def of(self, name: str) -> Rounder:
        """Return the rounder of one tensor, from its first value to its last."""
        if self.kind == NEAREST:
            return Rounder(None)
        digest = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        return Rounder(torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))


@dataclass(frozen=True)
class Rounder:
    """Rounds the parts of one tensor in turn; at random when it has a generator."""

    generator: torch.Generator | None

    def __call__(self, values: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Round ``values``, float32, to ``dtype``; rounding to the nearest value can write ``into`` a given tensor."""
        near = values.to(dtype) if into is None else into.copy_(values)
        if self.generator is None or dtype.itemsize >= values.dtype.itemsize:
            return near
        back = near.to(values.dtype)
        gap = values - back
        neighbour = torch.nextafter(near, torch.full_like(gap, math.inf).copysign(gap).to(dtype))
        step = (neighbour.to(values.dtype) - back).abs()
        chance = torch.rand(values.shape, generator=self.generator)
        return torch.where((chance * step < gap.abs()) & neighbour.isfinite(), neighbour, near)


@dataclass
class RoundingTally:
    """Sums of squares over one tensor, in double precision.

    Attributes:
        change: of the adapters' change, before rounding.
        error: of the rounding error.
    """

    change: float = 0.0
    error: float = 0.0

    def add(self, before: Tensor, after: Tensor, rounded: Tensor) -> None:
        """Add a tensor: the base's values, the merged ones in float32, and the merged ones rounded."""
        scratch = torch.empty_like(after, memory_format=torch.contiguous_format)
        self.add_change(before, after, scratch)
        self.add_error(after, rounded, scratch)

    def add_change(self, before: Tensor, after: Tensor, scratch: Tensor) -> None:
        """Add the adapters' change; ``scratch`` is contiguous, float32 and of ``after``'s shape."""
        self.change += _square_of_gap(before, after, scratch)

    def add_error(self, after: Tensor, rounded: Tensor, scratch: Tensor) -> None:
        """Add the rounding error."""
        if rounded.dtype != after.dtype:
            self.error += _square_of_gap(rounded, after, scratch)

    def figures(self, name: str, dtype: str) -> RoundingFigures:
        """Return the norms of the sums, as figures of a tensor."""
        return RoundingFigures(name, dtype, math.sqrt(self.change), math.sqrt(self.error))


def _square_of_gap(values: Tensor, after: Tensor, scratch: Tensor) -> float:
    flat = scratch.copy_(values).sub_(after).view(-1)
    return float(flat @ flat)


@dataclass(frozen=True)
class RoundingFigures:
    """The change and the rounding error of one merged tensor.

    Attributes:
        name: the tensor's.
        dtype: of the result, as safetensors calls it.
        change: norm of the change in float32.
        rounding_error: norm of the difference between the rounded result and the float32 one.
    """

    name: str
    dtype: str
    change: float
    rounding_error: float

    @property
    def share_kept(self) -> float:
        """The share of the change's energy that rounding leaves: ``1 - (rounding error / change)^2``, at least 0.

        1 when nothing is lost; 0 when the rounding is as large as the change, which is then gone or drowned in it.
        """
        if not self.change:
            return 1.0
        return max(0.0, 1.0 - (self.rounding_error / self.change) ** 2)
