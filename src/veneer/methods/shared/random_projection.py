"""Random tensors that all layers share and training leaves alone: drawn from a seed, so that none need be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.methods.base.abilities import SharesTensors
from veneer.methods.base.method import BaseLayer


class SharesProjection(SharesTensors):
    """Has shared tensors that the config's ``projection_prng_key`` gives, and that ``save_projection`` saves too."""

    def make_shared(
        self, config: Any, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        return seeded(self.shared_shapes(config, [base.site for base in bases]), config.projection_prng_key)

    def saves_shared(self, config: Any) -> bool:
        return bool(config.save_projection)


def largest(sites: Sequence[Site]) -> tuple[int, int]:
    """Return the largest ``out`` and the largest ``in`` of all layers, for which shared tensors must have room."""
    return max(site.shape[0] for site in sites), max(site.shape[1] for site in sites)


def seeded(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return random tensors, the same everywhere, so that a checkpoint may leave them out."""
    generator = torch.Generator().manual_seed(seed)
    return {leaf: _kaiming(shape, generator) for leaf, shape in shapes.items()}


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uniform values of the deviation ``sqrt(2 / fan_in)`` (He et al. 2015), drawn as peft draws them."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
