"""BEFT: bias-efficient fine-tuning (Huang et al. 2025, arXiv:2509.15974).

b' = b + c      c: (1, out); a layer without a bias gets one when the adapter is merged
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.configs.beft import BeftConfig
from veneer.methods.method import Base, Method
from veneer.patch import Patch
from veneer.sites import Site
from veneer.sites.conv import ConvSite
from veneer.sites.linear import LinearSite

SHIFT = "beft_bias"


class Beft(Method[BeftConfig, None]):
    """BEFT on linear layers and convolutions."""

    leaves = (SHIFT,)
    bias_leaves = frozenset({SHIFT})
    kinds = (LinearSite, ConvSite)

    def settings(self, config: BeftConfig, site: Site) -> None:
        return None

    def shapes(self, settings: None, site: Site) -> dict[str, tuple[int, ...]]:
        return {SHIFT: (1, site.shape[0])}

    def init(
        self, config: BeftConfig, settings: None, base: Base, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        std = 0.0 if config.init_weights else 1.0
        return {SHIFT: torch.empty(1, base.site.shape[0]).normal_(std=std, generator=generator)}

    def lower(self, settings: None, tensors: Mapping[str, Tensor], base: Base) -> Patch:
        return Patch(shift=tensors[SHIFT].flatten())


METHOD = Beft()
