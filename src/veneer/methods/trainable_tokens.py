"""Trainable tokens as an adapter of its own: single vectors of an embedding, all others as they were.

    W'[token] = v      v: the token's row of ``trainable_tokens_delta``, (n, dim)

From peft's documentation; there is no paper. Whatever shares the input embedding's weight gets the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.configs.trainable_tokens import TrainableTokensConfig
from veneer.methods.method import Base, Part
from veneer.methods.saved_weight import SAVED_WEIGHT
from veneer.methods.tokens import TokenRows, TokenSettings
from veneer.sites import Site
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.linear import LinearSite
from veneer.targets import shortest

if TYPE_CHECKING:
    from veneer.catalog import Catalog

VALUES = "trainable_tokens_delta"


class TrainableTokens(TokenRows[TrainableTokensConfig]):
    """Trainable tokens on embeddings and output layers."""

    leaves = (VALUES,)
    kinds = (EmbeddingSite, LinearSite)
    saves_twins = True

    def complete(self, config: TrainableTokensConfig, catalog: Catalog) -> None:
        if config.target_modules is None and catalog.inputs:
            config.target_modules = shortest(catalog.inputs, catalog.modules)

    def parts(self, config: TrainableTokensConfig, catalog: Catalog) -> list[Part]:
        own = self.part(config, catalog, catalog.sites(config))
        return [Part(SAVED_WEIGHT, own.everywhere, optional=True), own]

    def wanted(self, config: TrainableTokensConfig, site: Site) -> Sequence[int]:
        return config.token_indices

    def init(
        self,
        config: TrainableTokensConfig,
        settings: TokenSettings,
        base: Base,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        found = super().init(config, settings, base, generator)
        return found if config.init_weights else {VALUES: found[VALUES].normal_(generator=generator)}


METHOD = TrainableTokens()
