"""AdaLoRA's allocation of ranks to layers in training (Zhang et al. 2023, arXiv:2303.10512, section 3, algorithm 1).

Every rank i of every layer is scored by how much the loss depends on it:

    S_i = s(e_i) + mean of s(A_i) + mean of s(B_i)
    s(w) = I U      I: running mean of |w dL/dw|; U: running mean of how far that is from I

Between ``tinit`` and ``total_step - tfinal`` steps the number of ranks that are kept falls from ``init_r`` to
``target_r`` a layer, by a cubic law; of the others, the lowest scored, ``e_i`` is set to zero. They keep their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.configs.methods.adalora import AdaLoraConfig

A, B, E = "lora_A", "lora_B", "lora_E"
Layers = Sequence[Mapping[str, Tensor]]


@dataclass
class RankAllocation:
    """Holds what training has learned of the ranks of one adapter.

    Attributes:
        sensitivity: ``I`` of each tensor, in the order of the layers and of their leaves.
        uncertainty: ``U`` of each.
        kept: for each layer, which of its ranks are left, shape ``(r,)``; empty before the first is taken away.
    """

    sensitivity: list[Tensor] = field(default_factory=list)
    uncertainty: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def step(self, config: AdaLoraConfig, layers: Layers, step: int) -> None:
        """Score the ranks by the tensors' gradients, and take away what the schedule says of step ``step``."""
        assert config.total_step is not None
        last = config.total_step - config.tfinal
        if step < last:
            self._observe(config, layers)
        chooses = step == last or (config.tinit < step < last and step % config.deltaT == 0)
        if chooses:
            self._choose(layers, _budget(config, len(layers), step))
        if chooses or step > last:
            for tensors, mask in zip(layers, self.kept, strict=False):
                tensors[E].masked_fill_(~mask.unsqueeze(1), 0.0)

    def _observe(self, config: AdaLoraConfig, layers: Layers) -> None:
        tensors = [layer[leaf] for layer in layers for leaf in (A, B, E)]
        if not self.sensitivity:
            self.sensitivity = [torch.zeros_like(t) for t in tensors]
            self.uncertainty = [torch.zeros_like(t) for t in tensors]
        for tensor, mean, spread in zip(tensors, self.sensitivity, self.uncertainty, strict=True):
            if tensor.grad is None:
                continue
            now = (tensor * tensor.grad).abs()
            mean.lerp_(now, 1 - config.beta1)
            spread.lerp_((now - mean).abs(), 1 - config.beta2)

    def _choose(self, layers: Layers, budget: int) -> None:
        scores = [mean * spread for mean, spread in zip(self.sensitivity, self.uncertainty, strict=True)]
        by_layer = [
            scores[3 * i].mean(1) + scores[3 * i + 1].mean(0) + scores[3 * i + 2].flatten() for i in range(len(layers))
        ]
        everything = torch.cat(by_layer)
        removed = len(everything) - budget
        threshold = everything.kthvalue(removed).values if removed > 0 else everything.new_tensor(-1.0)
        self.kept = [score > threshold for score in by_layer]


def _budget(config: AdaLoraConfig, layers: int, step: int) -> int:
    """Return the number of ranks that all layers together have after a step."""
    assert config.total_step is not None
    first, final = config.init_r * layers, config.target_r * layers
    remaining = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
    return int((first - final) * max(remaining, 0.0) ** 3 + final)
