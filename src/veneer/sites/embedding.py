"""Embeddings: a look-up is a product with one-hot vectors, so the canonical matrix is ``(dim, vocabulary)``."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from veneer.sites.site import Site


class EmbeddingSite(Site):
    """``nn.Embedding``, and subclasses that scale what they look up."""

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, dim = self.stored.shape
        return dim, vocabulary

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        found = F.embedding(x, matrix.T, cast(nn.Embedding, self.module).padding_idx)
        # Gemma 3 and others multiply inside their embedding layer.
        scale = getattr(self.module, "embed_scale", None)
        return found * (scale.to(self.stored.dtype) if isinstance(scale, Tensor) else 1.0 if scale is None else scale)
