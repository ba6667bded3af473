"""Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222, section 3).

    X' = [E + D; X],  |D_i| <= epsilon_i        E: (tokens, dim) embeddings of examples, frozen; D: trained

``D`` is brought back to its ball before each step's forward pass (projected gradient descent, section 3.3). The loss
counts the labels of the examples too, each example by its weight (section 3.2). A checkpoint holds ``E + D`` alone:
trained further, what was loaded is the new centre.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.configs.methods.cpt import CPTConfig
from veneer.methods.base.prompt_method import IGNORED, PROMPT, PromptEncoder, PromptMethod

# The bound of the movement of a token that is neither input nor template.
STILL = 1e-10
# The width for which the config's epsilons are given.
WIDTH = 2048


class Context(PromptEncoder):
    """Holds the examples' embeddings and the distance that each has moved; parameters are named as in peft."""

    frozen = frozenset({"embedding.weight"})

    def __init__(self, config: CPTConfig, values: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(values.detach(), freeze=True)
        self.delta_embedding = nn.Embedding.from_pretrained(torch.zeros_like(values), freeze=not values.requires_grad)
        kinds = torch.tensor(config.cpt_tokens_type_mask) % 4
        scale = math.sqrt(values.shape[1] / WIDTH)
        limits = {1: config.opt_projection_format_epsilon, 2: config.opt_projection_epsilon}
        limits[3] = limits[1]
        counted = torch.tensor(config.cpt_tokens_type_mask) > 0
        self.limits = [
            limits[int(kind)] * scale if kind and here else STILL for kind, here in zip(kinds, counted, strict=True)
        ]
        self.moves = [bool(kind) for kind in kinds]

    def forward(self, tasks: Tensor | None) -> Tensor:
        delta: Tensor = self.delta_embedding.weight
        near = self._projected(delta)
        if self.training:
            with torch.no_grad():
                delta.copy_(near)
        else:
            delta = delta + (near - delta).detach()
        moves = torch.tensor(self.moves, device=delta.device).unsqueeze(1)
        moved: Tensor = self.embedding.weight + torch.where(moves, delta, delta.detach())
        return moved

    def get_epsilon(self) -> Tensor:
        """Return how far each token's embedding may move, shape ``(tokens,)``."""
        return torch.tensor(self.limits)

    def get_projection(self) -> Tensor:
        """Return how far each token's embedding has moved, within its bound: shape ``(tokens, width)``."""
        return self._projected(self.delta_embedding.weight)

    @torch.no_grad()
    def _projected(self, delta: Tensor) -> Tensor:
        """Return ``delta`` brought back into its balls."""
        limits = torch.tensor(self.limits, device=delta.device, dtype=delta.dtype)
        longest = torch.maximum(delta.norm(dim=1), limits).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * (limits / longest).unsqueeze(1)


class CPT(PromptMethod[CPTConfig]):
    """Makes prompts of examples, whose embeddings are trained within bounds."""

    def new(self, config: CPTConfig, words: nn.Module, generator: torch.Generator | None) -> PromptEncoder:
        index = torch.tensor(config.cpt_token_ids, device=next(words.parameters()).device)
        with torch.no_grad():
            values: Tensor = words(index).float()
        return Context(config, values.detach().requires_grad_())

    def restored(self, config: CPTConfig, tensors: Mapping[str, nn.Parameter]) -> PromptEncoder:
        return Context(config, tensors[PROMPT])

    def counted(self, config: CPTConfig, labels: Tensor, types: Tensor | None) -> tuple[Tensor, Tensor]:
        types_of_prompt = torch.tensor(config.cpt_tokens_type_mask, device=labels.device).expand(len(labels), -1)
        given = torch.full_like(labels, 4) if types is None else types.to(types_of_prompt)
        # The input's types continue those of the last whole example.
        last = -(-int(types_of_prompt.max()) // 4) * 4
        kinds = torch.cat([types_of_prompt, torch.where(given > 0, given + last, given)], dim=1)
        ids = torch.tensor(config.cpt_token_ids, device=labels.device).expand(len(labels), -1)
        of_label = (kinds > 0) & (kinds % 4 == 0)
        whole = torch.where(of_label, torch.cat([ids, labels], dim=1), IGNORED)
        return whole, _weights(config, torch.where(of_label, kinds, 0))


METHOD = CPT()


def _weights(config: CPTConfig, examples: Tensor) -> Tensor:
    """Return the weight of each label: one for the last example's, and a factor less for each one before it.

    Args:
        config: says the factor.
        examples: a number for each example's labels, growing; 0 elsewhere. Shape ``(rows, tokens)``.
    """
    weights = torch.ones(examples.shape, device=examples.device)
    if config.opt_weighted_loss_type == "none":
        return weights
    for row, labels in enumerate(examples):
        # A first token is no label: nothing predicts it.
        there = labels[1:][labels[1:] > 0].unique()
        later = (there.unsqueeze(1) > labels).sum(0)
        weights[row] = torch.where(labels > 0, config.opt_loss_decay_factor**later, 1.0)
    return weights
