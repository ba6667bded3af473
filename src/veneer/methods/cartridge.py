"""Cartridges: a trained cache in the place of a long text's (Eyuboglu et al. 2025, arXiv:2506.06266).

    K' = [C_K; K],  V' = [C_V; V]        C: (tokens, layers * 2 * heads * head dim)

The first tokens of ``C`` stay as they are: a model sinks attention into them. A new one is random.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.configs.methods.cartridge import CartridgeConfig
from veneer.methods.base.prompt_method import PROMPT, PromptEncoder, PromptMethod


class Cartridge(PromptEncoder):
    """Holds a table in two parts, of which the first is not trained; parameters are named as in peft."""

    frozen = frozenset({"frozen_embedding"})

    def __init__(self, values: Tensor, frozen: int) -> None:
        super().__init__()
        self.frozen_embedding = nn.Parameter(values.detach()[:frozen].clone(), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(values.detach()[frozen:].clone(), requires_grad=values.requires_grad)

    @property
    def weight(self) -> Tensor:
        """The whole table."""
        return self.forward(None)

    def forward(self, tasks: Tensor | None) -> Tensor:
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])


class Cartridges(PromptMethod[CartridgeConfig]):
    """Makes cartridges: trained keys and values."""

    fills_cache = True

    def new(self, config: CartridgeConfig, words: nn.Module, generator: torch.Generator | None) -> PromptEncoder:
        values = torch.randn(self.size(config), generator=generator).requires_grad_()
        return Cartridge(values, config.num_frozen_tokens)

    def restored(self, config: CartridgeConfig, tensors: Mapping[str, nn.Parameter]) -> PromptEncoder:
        return Cartridge(tensors[PROMPT], config.num_frozen_tokens)


METHOD = Cartridges()
