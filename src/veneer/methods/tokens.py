"""Trainable tokens: single rows of an embedding, trained and brought whole.

``trainable_tokens_delta``, shape ``(n, dim)``, holds the tokens' new vectors themselves, in the order of the
config's ``trainable_token_indices``. Where the output layer is tied to the embedding it gets the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.configs.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.methods.method import Base, Method
from veneer.patch import Patch, Tokens
from veneer.sites import Site
from veneer.sites.embedding import EmbeddingSite
from veneer.targets import names_match

VALUES = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class TokenSettings:
    """The tokens: ``index`` as in the config, ``ascending`` sorted, ``order`` what sorts it; each ``(n,)``."""

    index: Tensor
    ascending: Tensor
    order: Tensor
    rows: bool


class TrainableTokens(Method[LoraConfig, TokenSettings]):
    """Rows of an embedding."""

    leaves = (VALUES,)

    def in_memory(self, leaf: str) -> str:
        return "token_adapter.trainable_tokens_delta"

    def settings(self, config: LoraConfig, site: Site) -> TokenSettings:
        wanted = config.trainable_token_indices or []
        if isinstance(wanted, dict):
            # A tied output layer is named by none of them, and has the tokens of the embedding.
            named = [v for k, v in wanted.items() if names_match(site.name, [k])]
            wanted = named[0] if named else next(iter(wanted.values()))
        embedding = isinstance(site, EmbeddingSite)
        vocabulary = site.shape[1 if embedding else 0]
        if len(set(wanted)) != len(wanted) or not all(0 <= token < vocabulary for token in wanted):
            raise ConfigError(
                f"trainable_token_indices={list(wanted)!r} does not fit {site.name}.",
                hint=f"Name each token once, from 0 to {vocabulary - 1}.",
            )
        index = torch.tensor(list(wanted), dtype=torch.int64)
        ascending, order = index.sort()
        return TokenSettings(index, ascending, order, rows=not embedding)

    def shapes(self, settings: TokenSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {VALUES: (len(settings.index), site.shape[1 if settings.rows else 0])}

    def init(
        self, config: LoraConfig, settings: TokenSettings, base: Base, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        weight = base.base_weight()
        vectors = weight if settings.rows else weight.T
        return {VALUES: vectors[settings.index.to(vectors.device)].float()}

    def lower(self, settings: TokenSettings, tensors: Mapping[str, Tensor], base: Base) -> Patch:
        values = tensors[VALUES]
        index, order = settings.ascending.to(values.device), settings.order.to(values.device)
        return Patch(tokens=Tokens(index, values[order], settings.rows))


TOKENS = TrainableTokens()
