"""Uni-LoRA: one vector for all low-rank matrices (Li et al. 2025, arXiv:2506.00799, section 3).

    W' = W + B A        A = theta[i_A] * s_A, B = theta[i_B] * s_B        theta: (d,)

``theta`` is trained and shared by all layers. The entries of every layer's ``A`` and ``B``, counted through, are dealt
evenly to the ``d`` numbers and shuffled by a seed; ``s`` is one over the root of how often a number is used, which
makes the projection an isometry. Without ``save_indices`` a checkpoint is ``theta`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.unilora import UniLoraConfig
from veneer.methods.base.abilities import DerivesTensors, SharesTensors
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.patches.patch import Patch

INDICES_A, INDICES_B = "unilora_indices_A", "unilora_indices_B"
SCALES_A, SCALES_B = "unilora_scales_A", "unilora_scales_B"
THETA = "unilora_theta_d"


class UniLora(UniformMethod[UniLoraConfig], SharesTensors, DerivesTensors):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    leaves = (
        Leaf(INDICES_A, trained=False, integer=True),
        Leaf(INDICES_B, trained=False, integer=True),
        Leaf(SCALES_A, trained=False),
        Leaf(SCALES_B, trained=False),
    )
    shared = (Leaf(THETA),)

    def shapes(self, settings: UniLoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        if not settings.save_indices:
            return {}
        a, b = _shapes(settings, site)
        return {INDICES_A: a, INDICES_B: b, SCALES_A: a, SCALES_B: b}

    def shared_shapes(self, config: UniLoraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        return {THETA: (config.theta_d_length,)}

    def make_shared(
        self, config: UniLoraConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        theta, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
        drawn = (
            theta.uniform_(-bound, bound, generator=generator)
            if config.init_weights
            else theta.normal_(generator=generator)
        )
        return {THETA: drawn}

    def init(self, new: NewLayer[UniLoraConfig, UniLoraConfig]) -> dict[str, Tensor]:
        return {}

    def extra_tensors(
        self, config: UniLoraConfig, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        shapes = [shape for base in bases for shape in _shapes(config, base.site)]
        sizes = [rows * columns for rows, columns in shapes]
        dealt = _dealt(sum(sizes), config.theta_d_length, config.proj_seed)
        often = torch.bincount(dealt, minlength=config.theta_d_length).clamp_min(1)
        indices = [part.view(shape) for part, shape in zip(dealt.split(sizes), shapes, strict=True)]
        scales = [often[part].float().rsqrt() for part in indices]
        pairs = zip(indices[::2], indices[1::2], scales[::2], scales[1::2], strict=True)
        return [{**shared, **dict(zip(self.by_name, layer, strict=True))} for layer in pairs]

    def lower(self, settings: UniLoraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        theta = tensors[THETA]
        down, up = theta[tensors[INDICES_A]] * tensors[SCALES_A], theta[tensors[INDICES_B]] * tensors[SCALES_B]
        return Patch(up=up, down=down, dropout=settings.unilora_dropout)


METHOD = UniLora()


def _shapes(config: UniLoraConfig, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
    out, inner = site.shape
    return (config.r, inner), (out, config.r)


def _dealt(count: int, numbers: int, seed: int) -> Tensor:
    """Return ``count`` entries, int64, each one of ``numbers``, evenly dealt, drawn as peft draws them."""
    generator = np.random.default_rng(seed)
    rest = count % numbers
    dealt = np.repeat(np.arange(numbers), count // numbers)
    if rest:
        dealt = np.concatenate([dealt, generator.choice(numbers, size=rest, replace=False)])
    generator.shuffle(dealt)
    return torch.from_numpy(dealt)
