"""PVeRA: probabilistic vector-based random matrix adaptation (arXiv:2512.07703, section 3).

    W' = W + diag(b) B diag(d_1) A_1        d: (2r,), b: (out,)

``A``, ``(2r, largest in)``, and ``B``, ``(largest out, r)``, are VeRA's random matrices. The halves of ``d`` and ``A``
give the mean and the logarithm of the variance of a hidden vector. Here the mean is used, in training too: the second
halves are kept and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.configs.pvera import PveraConfig
from veneer.methods.method import Base, Method
from veneer.methods.vera import largest, seeded
from veneer.patch import Patch
from veneer.sites import Site
from veneer.sites.linear import LinearSite

D = "pvera_lambda_d"
B = "pvera_lambda_b"
SHARED_A = "pvera_A"
SHARED_B = "pvera_B"


class Pvera(Method[PveraConfig, PveraConfig]):
    """PVeRA on layers with a matrix."""

    kinds = (LinearSite,)
    leaves = (B, D)
    shared = (SHARED_A, SHARED_B)

    def settings(self, config: PveraConfig, site: Site) -> PveraConfig:
        return config

    def shapes(self, settings: PveraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        return {B: (site.shape[0],), D: (2 * settings.r,)}

    def shared_shapes(self, config: PveraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        out, inner = largest(sites)
        return {SHARED_A: (2 * config.r, inner), SHARED_B: (out, config.r)}

    def make_shared(
        self, config: PveraConfig, bases: Sequence[Base], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        return seeded(self.shared_shapes(config, [base.site for base in bases]), config.projection_prng_key)

    def saves_shared(self, config: PveraConfig) -> bool:
        return config.save_projection

    def init(
        self, config: PveraConfig, settings: PveraConfig, base: Base, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        if config.init_weights:
            return {B: torch.zeros(base.site.shape[0]), D: torch.full((2 * config.r,), config.d_initial)}
        return {B: torch.ones(base.site.shape[0]), D: torch.randn(2 * config.r, generator=generator)}

    def lower(self, settings: PveraConfig, tensors: Mapping[str, Tensor], base: Base) -> Patch:
        out, inner = base.site.shape
        r = settings.r
        up = tensors[B].unsqueeze(1) * tensors[SHARED_B][:out]
        down = tensors[D][:r].unsqueeze(1) * tensors[SHARED_A][:r, :inner]
        return Patch(up=up, down=down, dropout=settings.pvera_dropout)


METHOD = Pvera()
