"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv:2310.11454, section 3).

    W' = W + diag(b) B diag(d) A        d: (r,), b: (out,)

``A``, ``(r, largest in)``, and ``B``, ``(largest out, r)``, are random, frozen and shared by all layers, each of
which uses as many columns and rows as it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.vera import VeraConfig
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.methods.shared.random_projection import SharesProjection, largest
from veneer.patches.patch import Patch

D = "vera_lambda_d"
B = "vera_lambda_b"
SHARED_A = "vera_A"
SHARED_B = "vera_B"


class Vera(UniformMethod[VeraConfig], SharesProjection):
    """Adapts linear layers."""

    leaves = (Leaf(B), Leaf(D))
    kinds = (LinearSite,)
    shared = (Leaf(SHARED_A, trained=False), Leaf(SHARED_B, trained=False))

    def shapes(self, settings: VeraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        return {B: (site.shape[0],), D: (settings.r,)}

    def shared_shapes(self, config: VeraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        out, inner = largest(sites)
        return {SHARED_A: (config.r, inner), SHARED_B: (out, config.r)}

    def init(self, new: NewLayer[VeraConfig, VeraConfig]) -> dict[str, Tensor]:
        if new.config.init_weights:
            return {B: torch.zeros(new.site.shape[0]), D: torch.full((new.config.r,), float(new.config.d_initial))}
        return {B: torch.ones(new.site.shape[0]), D: new.normal((new.config.r,))}

    def lower(self, settings: VeraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        out, inner = base.site.shape
        up = tensors[B].unsqueeze(1) * tensors[SHARED_B][:out]
        down = tensors[D].unsqueeze(1) * tensors[SHARED_A][:, :inner]
        return Patch(up=up, down=down, dropout=settings.vera_dropout)


METHOD = Vera()
