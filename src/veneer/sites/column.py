"""Parameters that are vectors, seen as a matrix of one column."""

from __future__ import annotations

from torch import Tensor

from veneer.sites.site import Site


class ColumnSite(Site):
    """A vector of shape ``(out,)``, canonically ``(out, 1)``."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], 1

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(1)
