"""Prefix tuning: trained keys and values before every layer's own (Li and Liang 2021, arXiv:2101.00190, section 4).

    K' = [P_K; K],  V' = [P_V; V]        P: (tokens, layers * 2 * heads * head dim)

With ``prefix_projection``, ``P = MLP(P')`` with a smaller ``P'`` (section 4.3). A checkpoint holds ``P`` alone, so that
what is loaded is a table; trained further, the table itself is trained. In an encoder-decoder the decoder gets it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.configs.methods.prefix_tuning import PrefixTuningConfig
from veneer.methods.base.prompt_method import EmbeddingTable, PromptEncoder, PromptMethod, fresh


class Projection(PromptEncoder):
    """Holds a small table and the network that makes the prefix of it; parameters are named as in peft."""

    def __init__(self, config: PrefixTuningConfig, tokens: int, width: int) -> None:
        super().__init__()
        dim = config.token_dim or 0
        hidden = config.encoder_hidden_size or dim
        self.embedding = nn.Embedding(tokens, dim)
        last = nn.Linear(hidden, width)
        if config.init_weights == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), last)

    def forward(self, tasks: Tensor | None) -> Tensor:
        prefix: Tensor = self.transform(self.embedding.weight)
        return prefix


class PrefixTuning(PromptMethod[PrefixTuningConfig]):
    """Makes prefixes: trained keys and values of every layer."""

    fills_cache = True

    def new(self, config: PrefixTuningConfig, words: nn.Module, generator: torch.Generator | None) -> PromptEncoder:
        size = self.size(config)
        if config.prefix_projection:
            return fresh(lambda: Projection(config, *size), generator)
        zero = config.init_weights == "zero"
        return EmbeddingTable((torch.zeros(size) if zero else torch.randn(size, generator=generator)).requires_grad_())


METHOD = PrefixTuning()
