"""Single rows of an embedding, trained and brought whole: beside a LoRA, or as an adapter of their own.

``trainable_tokens_delta``, shape ``(n, dim)``, holds the tokens' new vectors themselves, in the order of the
config's indices. Whatever shares the input embedding's weight gets the same rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.base_model.targets import names_match
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import ConfigError
from veneer.methods.base.abilities import AdaptsTwins
from veneer.methods.base.method import BaseLayer, ConfigT, Leaf, Method, MethodOnSites, NewLayer
from veneer.patches.patch import Patch, Tokens

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog


_ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class TokenSettings:
    """Holds the tokens: ``index`` as in the config, ``ascending`` sorted, ``order`` sorts it; each ``(n,)``.

    ``padding`` is the place among the sorted ones of the token that the embedding never trains.
    """

    index: Tensor
    ascending: Tensor
    order: Tensor
    rows: bool
    padding: int | None = None


class TokenRows(Method[ConfigT, TokenSettings], AdaptsTwins):
    """Puts trained rows in the place of an embedding's; its one leaf holds them."""

    @abstractmethod
    def tokens(self, config: ConfigT, site: Site) -> Sequence[int]:
        """Return the tokens that the config means on a layer."""

    def settings(self, config: ConfigT, site: Site) -> TokenSettings:
        return self._settings(list(self.tokens(config, site)), site)

    def _settings(self, tokens: list[int], site: Site) -> TokenSettings:
        vocabulary = site.shape[1 if site.looks_up else 0]
        if len(set(tokens)) != len(tokens) or not all(0 <= token < vocabulary for token in tokens):
            raise ConfigError(
                f"The trained tokens {tokens!r} do not fit {site.name}.",
                hint=f"Name each token once, from 0 to {vocabulary - 1}.",
            )
        index = torch.tensor(tokens, dtype=torch.int64)
        ascending, order = index.sort()
        place = sorted(tokens).index(site.padding) if site.padding in tokens else None
        return TokenSettings(index, ascending, order, not site.looks_up, place)

    def part(self, config: ConfigT, catalog: Catalog, sites: Sequence[Site]) -> MethodOnSites:
        """Return ``sites``, and with an input embedding all layers that share its weight, such as an output layer.

        These have the embedding's rows, unless other tokens are named for one of them. What is done to one of them
        alone is meant for that one.

        Raises:
            ConfigError: other tokens are named for what is to stay alike.
        """
        listed, twins = {site.name for site in sites}, dict[str, list[Site]]()
        for site in (site for site in sites if site.name in catalog.input_embeddings):
            sharing = catalog.sharing(site.name)
            apart = {twin.name for twin in sharing if twin.name in listed and not self.follows(config, twin)}
            if self._are_alike(config, site, [twin for twin in sharing if twin.name in listed]):
                twins[site.id] = [twin for twin in sharing if twin.name not in apart]
        followers = {twin.name for group in twins.values() for twin in group}
        return MethodOnSites(self, [site for site in sites if site.name not in followers], twins)

    def _are_alike(self, config: ConfigT, site: Site, twins: Sequence[Site]) -> bool:
        """Tell whether the config means the same tokens on a layer and on others."""
        tokens = self.tokens(config, site)
        apart = next((twin.name for twin in twins if self.tokens(config, twin) != tokens), None)
        if apart is not None and getattr(config, "ensure_weight_tying", False):
            raise ConfigError(
                "Cannot ensure weight tying when different token indices are specified: "
                f"{site.name} and {apart} share a weight, and other tokens are to be trained in each.",
                hint="Name the same tokens, or train with ensure_weight_tying=False.",
            )
        return apart is None

    def follows(self, config: ConfigT, twin: Site) -> bool:
        """Tell whether a layer that the config means too has the rows of the embedding whose weight it shares."""
        return True

    def twin_settings(self, settings: TokenSettings, twin: Site) -> TokenSettings:
        return self._settings(settings.index.tolist(), twin)

    def shapes(self, settings: TokenSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {self.leaves[0].name: (len(settings.index), site.shape[1 if settings.rows else 0])}

    def init(self, new: NewLayer[ConfigT, TokenSettings]) -> dict[str, Tensor]:
        weight = new.base.base_weight()
        vectors = weight if new.settings.rows else weight.T
        return {self.leaves[0].name: vectors[new.settings.index.to(vectors.device)].float()}

    def lower(self, settings: TokenSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        values = tensors[self.leaves[0].name]
        index, order = settings.ascending.to(values.device), settings.order.to(values.device)
        return Patch(tokens=Tokens(index, values[order], settings.rows, settings.padding))


class LoraTokens(TokenRows[LoraConfig]):
    """Trains the tokens of ``trainable_token_indices`` beside a LoRA."""

    leaves = (Leaf(_ROWS, memory_name=f"{_ROWS}."),)

    def tokens(self, config: LoraConfig, site: Site) -> Sequence[int]:
        indices = config.trainable_token_indices or []
        if not isinstance(indices, dict):
            return indices
        return next(tokens for name, tokens in indices.items() if names_match(site.name, [name]))

    def follows(self, config: LoraConfig, twin: Site) -> bool:
        # As in peft: a layer that the config names by its ending only has rows of its own.
        return twin.name in (config.trainable_token_indices or ())


TOKENS = LoraTokens()


def check_not_whole(parts: Iterable[MethodOnSites], saved: Collection[str]) -> None:
    """Raise ``ConfigError`` where the rows of single tokens are to be trained in a module that is trained whole."""
    sites = [site for part in parts if isinstance(part.method, TokenRows) for site in part.sites]
    both = next((site.name for site in sites if site.name in saved), None)
    if both is not None:
        raise ConfigError(
            f"The embedding layer is already marked to be trained fully: modules_to_save names {both}.",
            hint="Name it there, or some of its tokens in trainable_token_indices.",
        )
