"""RandLoRA: full-rank low-rank adaptation (Albert et al. 2025, arXiv:2502.00987, section 4).

    W' = W + scale * sum_j B_j diag(lambda_j) A diag(gamma_j)        lambda: (r, n), gamma: (n, small)

``A``, ``(r, 1, small)``, and ``B``, ``(large, n, r)``, are random, frozen and shared by all layers, each of which uses
the part that it has room for; ``small`` and ``large`` are the lesser and the greater of a layer's in and out, and
``n = ceil(small / r)`` bases fill the rank. Where ``out`` is the lesser the product is turned over.

peft flattens the bases and the rank of ``B`` in this order and those of the scaled ``A`` in the other. Both are random,
so that it is as good a basis; the checkpoints mean it, and it is what is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.randlora import RandLoraConfig
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.methods.shared.random_projection import SharesProjection
from veneer.patches.patch import Patch

LAMBDA = "randlora_lambda"
GAMMA = "randlora_gamma"
SHARED_A = "randlora_A"
SHARED_B = "randlora_B"


class RandLora(UniformMethod[RandLoraConfig], SharesProjection):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    # peft writes the shared tensors once more for every layer.
    leaves = (Leaf(LAMBDA), Leaf(GAMMA), Leaf(SHARED_A, loaded=False), Leaf(SHARED_B, loaded=False))
    shared = (Leaf(SHARED_A, trained=False), Leaf(SHARED_B, trained=False))

    def shapes(self, settings: RandLoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        small, bases = min(site.shape), math.ceil(min(site.shape) / settings.r)
        return {LAMBDA: (settings.r, bases), GAMMA: (bases, small)}

    def shared_shapes(self, config: RandLoraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        sides = [max(site.shape[side] for site in sites) for side in (0, 1)]
        small, large = min(sides), max(sides)
        return {SHARED_A: (config.r, 1, small), SHARED_B: (large, math.ceil(small / config.r), config.r)}

    def make_shared(
        self, config: RandLoraConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        # Seeded by the config and drawn as peft draws, so that a checkpoint without them means the same everywhere.
        seeded = torch.Generator().manual_seed(config.projection_prng_key)
        shapes = self.shared_shapes(config, [base.site for base in bases])
        if config.sparse or config.very_sparse:
            few = math.sqrt(shapes[SHARED_A][2]) if config.very_sparse else 3
            tensors = {leaf: _signs(shapes[leaf], few, seeded) for leaf in (SHARED_A, SHARED_B)}
        else:
            large, count, r = shapes[SHARED_B]
            tensors = {SHARED_A: _uniform(shapes[SHARED_A], seeded)}
            tensors[SHARED_B] = torch.cat([_uniform((large, 1, r), seeded) for _ in range(count)], 1)
        return {leaf: (tensor / tensor.std()).float() for leaf, tensor in tensors.items()}

    def init(self, new: NewLayer[RandLoraConfig, RandLoraConfig]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        if new.config.init_weights:
            return {LAMBDA: torch.zeros(shapes[LAMBDA]), GAMMA: torch.full(shapes[GAMMA], 1 / max(shapes[GAMMA]))}
        return {
            LAMBDA: new.normal(shapes[LAMBDA]),
            GAMMA: torch.full(shapes[GAMMA], 1 / max(new.site.shape)),
        }

    def lower(self, settings: RandLoraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        out, inner = base.site.shape
        count, small = tensors[GAMMA].shape
        scaled = tensors[LAMBDA].unsqueeze(2) * tensors[SHARED_A][:, :, :small] * tensors[GAMMA]  # (r, n, small)
        down = scaled.flatten(0, 1)
        up = tensors[SHARED_B][: max(out, inner), :count].flatten(1)
        if out < inner:
            up, down = down.T, up.T
        return Patch(up=up, down=down, scale=settings.randlora_alpha / settings.r, dropout=settings.randlora_dropout)


METHOD = RandLora()


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uniform values of the deviation ``1 / sqrt(3 * fan_in)``, in the precision that peft draws in."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _signs(shape: tuple[int, ...], few: float, generator: torch.Generator) -> Tensor:
    """Return -1 and 1 with the probability ``1 / (2 * few)`` each, else 0 (Bingham and Mannila 2001)."""
    drawn = torch.rand(shape, generator=generator)
    share = 1 / (2 * few)
    return (drawn > 1 - share).float() - (drawn < share).float()
