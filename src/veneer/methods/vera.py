"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv:2310.11454, section 3).

    W' = W + diag(b) B diag(d) A        d: (r,), b: (out,)

``A``, ``(r, largest in)``, and ``B``, ``(largest out, r)``, are random, frozen and shared by all layers, each of
which uses as many columns and rows as it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.vera import VeraConfig
from veneer.methods.base.abilities import SharesTensors
from veneer.methods.base.leaf import Leaf
from veneer.methods.base.method import BaseLayer, Method, NewLayer
from veneer.patches.patch import Patch

D = "vera_lambda_d"
B = "vera_lambda_b"
SHARED_A = "vera_A"
SHARED_B = "vera_B"


class Vera(Method[VeraConfig, VeraConfig], SharesTensors):
    """VeRA on layers with a matrix."""

    leaves = (Leaf(B), Leaf(D))
    kinds = (LinearSite,)
    shared = (Leaf(SHARED_A, trained=False), Leaf(SHARED_B, trained=False))

    def settings(self, config: VeraConfig, site: Site) -> VeraConfig:
        return config

    def shapes(self, settings: VeraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        return {B: (site.shape[0],), D: (settings.r,)}

    def shared_shapes(self, config: VeraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        out, inner = largest(sites)
        return {SHARED_A: (config.r, inner), SHARED_B: (out, config.r)}

    def make_shared(
        self, config: VeraConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        return seeded(self.shared_shapes(config, [base.site for base in bases]), config.projection_prng_key)

    def saves_shared(self, config: VeraConfig) -> bool:
        return config.save_projection

    def init(self, new: NewLayer[VeraConfig, VeraConfig]) -> dict[str, Tensor]:
        return {B: torch.zeros(new.site.shape[0]), D: torch.full((new.config.r,), float(new.config.d_initial))}

    def lower(self, settings: VeraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        out, inner = base.site.shape
        up = tensors[B].unsqueeze(1) * tensors[SHARED_B][:out]
        down = tensors[D].unsqueeze(1) * tensors[SHARED_A][:, :inner]
        return Patch(up=up, down=down, dropout=settings.vera_dropout)


METHOD = Vera()


def largest(sites: Sequence[Site]) -> tuple[int, int]:
    """The largest ``out`` and the largest ``in`` of all layers, which tensors for all of them must have room for."""
    return max(site.shape[0] for site in sites), max(site.shape[1] for site in sites)


def seeded(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random tensors, in the order of ``shapes``; the same everywhere, so that a checkpoint may leave them out."""
    generator = torch.Generator().manual_seed(seed)
    return {leaf: _kaiming(shape, generator) for leaf, shape in shapes.items()}


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform with the deviation ``sqrt(2 / fan_in)`` (He et al. 2015), drawn in the order that peft draws in."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
