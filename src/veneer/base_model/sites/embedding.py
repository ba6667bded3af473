"""Sites of embeddings: a look-up multiplies one-hot vectors, so the canonical matrix is ``(dim, vocabulary)``."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.sites.site import Site


class EmbeddingSite(Site):
    """``nn.Embedding``, and subclasses that scale what they look up."""

    looks_up = True
    low_rank_names = ("lora_embedding_A", "lora_embedding_B")

    @property
    def products(self) -> bool:  # type: ignore[override]
        """False where the layer limits its vectors' norm or counts each token, which no sum of products can do."""
        return self._table.max_norm is None and not self._table.scale_grad_by_freq

    @property
    def _table(self) -> nn.Embedding:
        return cast(nn.Embedding, self.module)

    @property
    def padding(self) -> int | None:
        token: int | None = self._table.padding_idx
        return token

    @property
    def shape(self) -> tuple[int, int]:
        vocabulary, dim = self.stored.shape
        return dim, vocabulary

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.vectors(x, matrix.T, self.padding)

    def vectors(self, places: Tensor, table: Tensor, padding: int | None) -> Tensor:
        rows = F.embedding(places, table, padding)
        # Gemma 3 and others multiply inside their embedding layer, by a buffer; BART and others by a plain number.
        scale = getattr(self.module, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale = scale.to(self.stored.dtype)
        return rows if scale is None else rows * scale
