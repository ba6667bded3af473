"""Trainable tokens as an adapter of its own: single vectors of an embedding, all others as they were.

    W'[token] = v      v: the token's row of ``trainable_tokens_delta``, (n, dim)

From peft's documentation; there is no paper. Whatever shares the input embedding's weight gets the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import shortest
from veneer.configs.methods.trainable_tokens import TrainableTokensConfig
from veneer.errors import TargetError
from veneer.methods.base.abilities import ChoosesLayers, CompletesConfig
from veneer.methods.base.method import Leaf, MethodOnSites, NewLayer
from veneer.methods.base.replaced_weight import SAVED_WEIGHT
from veneer.methods.shared.token_rows import TokenRows, TokenSettings

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

VALUES = "trainable_tokens_delta"


class TrainableTokens(TokenRows[TrainableTokensConfig], ChoosesLayers, CompletesConfig):
    """Adapts embeddings and output layers."""

    leaves = (Leaf(VALUES),)
    kinds = (EmbeddingSite, LinearSite)
    saves_twins = True

    def complete(self, config: TrainableTokensConfig, catalog: Catalog) -> None:
        if config.target_modules is None and not catalog.input_embeddings:
            raise TargetError(
                "Target modules embed_tokens not found in the base model. It names no module that embeds its input.",
                hint="Name that module in target_modules.",
            )
        if config.target_modules is None:
            config.target_modules = shortest(catalog.input_embeddings, catalog.modules)

    def parts(self, config: TrainableTokensConfig, catalog: Catalog) -> list[MethodOnSites]:
        tokens = self.part(config, catalog, catalog.sites(config))
        return [MethodOnSites(SAVED_WEIGHT, tokens.everywhere, optional=True), tokens]

    def tokens(self, config: TrainableTokensConfig, site: Site) -> Sequence[int]:
        return config.token_indices

    def init(self, new: NewLayer[TrainableTokensConfig, TokenSettings]) -> dict[str, Tensor]:
        tensors = super().init(new)
        return tensors if new.config.init_weights else {VALUES: tensors[VALUES].normal_(generator=new.generator)}


METHOD = TrainableTokens()
