"""DeLoRA: decoupled low-rank adaptation (Bini et al. 2025, arXiv:2503.18225, section 3.2).

    W' = W + B diag(lambda / (r |a_i| |b_i|)) A diag(n)      A: (r, in), B: (out, r), lambda: (1,), n: (in,)

``a_i`` is a row of A, ``b_i`` a column of B, and ``n`` the length of each column of the base's weight when the adapter
was made; it is saved, and not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.delora import DeloraConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch

A, B, LAMBDA, NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
# The least length of a row or column.
SHORTEST = 1e-4


@dataclass(frozen=True)
class DeloraSettings:
    """Holds a config's values for one layer."""

    r: int
    size: float
    dropout: float


class Delora(Method[DeloraConfig, DeloraSettings]):
    """Adapts linear layers."""

    leaves = (Leaf(A), Leaf(B), Leaf(LAMBDA), Leaf(NORM, trained=False))
    kinds = (LinearSite,)

    def settings(self, config: DeloraConfig, site: Site) -> DeloraSettings:
        r = pattern_value(site.name, config.rank_pattern, config.r)
        size = pattern_value(site.name, config.lambda_pattern, config.delora_lambda)
        return DeloraSettings(r, size, config.module_dropout)

    def shapes(self, settings: DeloraSettings, site: Site) -> dict[str, tuple[int, ...]]:
        (out, inner), r = site.shape, settings.r
        return {A: (r, inner), B: (out, r), LAMBDA: (1,), NORM: (inner,)}

    def init(self, new: NewLayer[DeloraConfig, DeloraSettings]) -> dict[str, Tensor]:
        shapes = {leaf: shape for leaf, shape in self.shapes(new.settings, new.site).items() if leaf in (A, B)}
        tensors = new.kaiming(shapes, {B} if new.config.init_weights else ())
        norm = new.base.base_weight().float().norm(dim=0)
        return {**tensors, LAMBDA: torch.full((1,), float(new.settings.size)), NORM: norm}

    def lower(self, settings: DeloraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        down, up = tensors[A].float(), tensors[B].float()
        lengths = down.norm(dim=1).clamp_min(SHORTEST) * up.norm(dim=0).clamp_min(SHORTEST)
        scaled = up * (tensors[LAMBDA].float() / settings.r / lengths)
        return Patch(up=scaled, down=down * tensors[NORM].float(), dropout=settings.dropout)


METHOD = Delora()
