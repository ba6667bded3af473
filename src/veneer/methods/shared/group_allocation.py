"""AdaMSS's choice of the groups that training goes on with (Zheng et al. 2025, NeurIPS, section 3; ``use_asa``).

Every group of every layer is scored by how much the loss depends on it:

    S_g = mean of s(A_g) + mean of s(B_g)
    s(w) = I U      I: running mean of |w dL/dw|; U: running mean of how far that is from the I before

Every ``mask_interval`` steps the highest scored go on, fewer each time until ``asa_target_subspaces`` are left at
``final_warmup``; the others stay as they are from then on. The running means begin anew after each choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.configs.methods.adamss import AdamssConfig

A, B = "adamss_A.", "adamss_B."
# A group's A and B.
Group = tuple[Tensor, Tensor]


@dataclass
class GroupAllocation:
    """Holds what training has learned of the groups of one adapter.

    Attributes:
        sensitivity: ``I`` of each group's A and B since the last choice.
        uncertainty: ``U`` of each.
        frozen: the groups that are not trained any more, by their place among those of all layers.
    """

    sensitivity: list[Group] = field(default_factory=list)
    uncertainty: list[Group] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)

    @torch.no_grad()
    def step(self, config: AdamssConfig, layers: Sequence[Mapping[str, Tensor]], step: int) -> None:
        """Score the groups by the tensors' gradients, and freeze what the schedule says of step ``step``."""
        groups = [
            (tensors[leaf], tensors[leaf.replace(A, B)]) for tensors in layers for leaf in tensors if leaf.startswith(A)
        ]
        if config.init_warmup <= step <= config.final_warmup:
            self._observe(config, groups)
            if step % config.mask_interval == 0:
                self._choose(_wanted(config, len(groups), step))
        # Each time: selecting the adapter again lets all of it be trained.
        for index in self.frozen:
            for tensor in groups[index]:
                tensor.requires_grad_(False)
                tensor.grad = None

    def _observe(self, config: AdamssConfig, groups: Sequence[Group]) -> None:
        if not self.sensitivity:
            self.sensitivity = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in groups]
            self.uncertainty = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in groups]
        for group, means, spreads in zip(groups, self.sensitivity, self.uncertainty, strict=True):
            for tensor, mean, spread in zip(group, means, spreads, strict=True):
                if tensor.grad is None:
                    continue
                now = (tensor * tensor.grad).abs()
                spread.lerp_((now - mean).abs(), 1 - config.asa_uncertainty_beta)
                mean.lerp_(now, 1 - config.asa_importance_beta)

    def _choose(self, count: int) -> None:
        scores = {i: self._score(i) for i in range(len(self.sensitivity)) if i not in self.frozen}
        self.frozen.update(sorted(scores, key=lambda index: -scores[index])[count:])
        self.sensitivity, self.uncertainty = [], []

    def _score(self, index: int) -> float:
        pairs = zip(self.sensitivity[index], self.uncertainty[index], strict=True)
        return sum(float((mean * spread).mean()) for mean, spread in pairs)


def _wanted(config: AdamssConfig, total: int, step: int) -> int:
    """Return the number of groups, of all layers together, that go on after a choice."""
    final = config.asa_target_subspaces
    remaining = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    return int(final + max(total - final, 0) * remaining**config.asa_schedule_exponent)
