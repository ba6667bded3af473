"""Computes the principal directions of rows that come in batches.

Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.1:

    [S V^T; X - mean(X); sqrt(n m / (n + m)) (mean - mean(X))] = U' S' V'^T        n rows before, m rows in X
"""

from __future__ import annotations

import torch
from torch import Tensor


class PrincipalDirections:
    """The first ``size`` directions in which rows vary, and the variance along each.

    Attributes:
        size: the number of directions.
        seen: the number of rows so far; batches with fewer rows than ``size`` do not count.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self._mean = torch.zeros(())
        self._spread = torch.zeros(())  # the sum of all squared distances from the mean
        self._values = torch.zeros(0)
        self._directions = torch.zeros(0)  # (size, dim)
        self._turned = torch.zeros(0)  # the cosines between the last two directions

    def add(self, rows: Tensor) -> None:
        """Add a batch, shape ``(m, dim)``, float32."""
        m = len(rows)
        self.size = min(self.size, rows.shape[1])
        if m < self.size:
            return
        mean = rows.mean(0)
        centred = rows - mean
        spread = centred.square().sum()
        if self.seen:
            shift = (self.seen * m / (self.seen + m)) ** 0.5 * (self._mean - mean)
            centred = torch.cat([self._values.unsqueeze(1) * self._directions, centred, shift.unsqueeze(0)])
            spread = self._spread + spread + shift.square().sum()
            mean = (self._mean * self.seen + mean * m) / (self.seen + m)
        values, directions = self._decompose(centred)
        if self.seen:
            self._turned = torch.cosine_similarity(directions, self._directions)
        self._mean, self._spread, self._values, self._directions = mean, spread, values, directions
        self.seen += m

    def _decompose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first singular values and right vectors; the largest entry of each vector is positive."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, values, columns = torch.svd_lowrank(rows, q=min(2 * self.size, *rows.shape), niter=4)
        directions = columns.T[: self.size]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return values[: self.size], directions * largest.sign()

    def steady(self, rank: int, tau: float) -> bool:
        """Tell whether the last batch turned none of the first ``rank`` directions by more than the cosine ``tau``."""
        rank = min(rank, self.size)
        return len(self._turned) >= rank and bool((self._turned[:rank] >= tau).all())

    def explained(self) -> Tensor:
        """Return the share of the rows' variance that each direction explains, shape ``(size,)``."""
        return self._values.square() / self._spread

    def rows(self, rank: int, whiten: bool) -> Tensor:
        """Return the first ``rank`` directions, ``(rank, dim)``; whitened, over the root of their singular values."""
        directions = self._directions[:rank]
        return directions / self._values[:rank].sqrt().unsqueeze(1) if whiten else directions
