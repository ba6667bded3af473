"""Single rows of an embedding, trained and brought whole: beside a LoRA, or as an adapter of their own.

``trainable_tokens_delta``, shape ``(n, dim)``, holds the tokens' new vectors themselves, in the order of the
config's indices. Where the output layer is tied to the embedding it gets the same rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.configs.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.methods.method import Base, ConfigT, Method
from veneer.patch import Patch, Tokens
from veneer.sites import Site
from veneer.sites.embedding import EmbeddingSite
from veneer.targets import names_match


@dataclass(frozen=True)
class TokenSettings:
    """The tokens: ``index`` as in the config, ``ascending`` sorted, ``order`` what sorts it; each ``(n,)``."""

    index: Tensor
    ascending: Tensor
    order: Tensor
    rows: bool


class TokenRows(Method[ConfigT, TokenSettings]):
    """Rows of an embedding; ``leaves`` is the one tensor that holds them."""

    @abstractmethod
    def wanted(self, config: ConfigT, site: Site) -> Sequence[int]:
        """The tokens that the config means on a layer."""

    def settings(self, config: ConfigT, site: Site) -> TokenSettings:
        wanted = list(self.wanted(config, site))
        embedding = isinstance(site, EmbeddingSite)
        vocabulary = site.shape[1 if embedding else 0]
        if len(set(wanted)) != len(wanted) or not all(0 <= token < vocabulary for token in wanted):
            raise ConfigError(
                f"The trained tokens {wanted!r} do not fit {site.name}.",
                hint=f"Name each token once, from 0 to {vocabulary - 1}.",
            )
        index = torch.tensor(wanted, dtype=torch.int64)
        ascending, order = index.sort()
        return TokenSettings(index, ascending, order, rows=not embedding)

    def shapes(self, settings: TokenSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {self.leaves[0]: (len(settings.index), site.shape[1 if settings.rows else 0])}

    def init(
        self, config: ConfigT, settings: TokenSettings, base: Base, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        weight = base.base_weight()
        vectors = weight if settings.rows else weight.T
        return {self.leaves[0]: vectors[settings.index.to(vectors.device)].float()}

    def lower(self, settings: TokenSettings, tensors: Mapping[str, Tensor], base: Base) -> Patch:
        values = tensors[self.leaves[0]]
        index, order = settings.ascending.to(values.device), settings.order.to(values.device)
        return Patch(tokens=Tokens(index, values[order], settings.rows))


class LoraTokens(TokenRows[LoraConfig]):
    """The tokens of ``trainable_token_indices``, beside a LoRA."""

    leaves = ("token_adapter.trainable_tokens_delta",)

    def wanted(self, config: LoraConfig, site: Site) -> Sequence[int]:
        wanted = config.trainable_token_indices or []
        if not isinstance(wanted, dict):
            return wanted
        # A tied output layer is named by none of them, and has the tokens of the embedding.
        named = [v for k, v in wanted.items() if names_match(site.name, [k])]
        return named[0] if named else next(iter(wanted.values()))


TOKENS = LoraTokens()


def own_rows(config: LoraConfig, sites: Sequence[Site]) -> list[Site]:
    """``sites`` without an output layer that shares the embedding's weight and has the same tokens."""
    embeddings = [site for site in sites if isinstance(site, EmbeddingSite)]

    def repeats(site: Site) -> bool:
        tokens = TOKENS.wanted(config, site)
        return any(site.stored is e.stored and TOKENS.wanted(config, e) == tokens for e in embeddings)

    return [site for site in sites if isinstance(site, EmbeddingSite) or not repeats(site)]
