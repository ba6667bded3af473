"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, openreview:TwJrTz9cRS, section 3).

    W' = W + W * (B A)      A: (r, in), B: (out, r); the product with W is entrywise

A convolution's A holds kernels, (r, in, k1, k2), and its B ones of size 1. W is the base's own weight, for each of
several adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.hira import HiraConfig
from veneer.methods.base.abilities import SettledByCheckpoint
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.rotation import check_groups
from veneer.patches.operators import HadamardLowRank
from veneer.patches.patch import Patch

A, B = "hira_A", "hira_B"
EMBEDDING_A, EMBEDDING_B = "hira_embedding_A", "hira_embedding_B"


@dataclass(frozen=True)
class HiraSettings:
    """Holds a config's values for one layer."""

    r: int
    dropout: float


class Hira(Method[HiraConfig, HiraSettings], SettledByCheckpoint):
    """Adapts linear layers, convolutions and embeddings."""

    leaves = (Leaf(A), Leaf(B), Leaf(EMBEDDING_A), Leaf(EMBEDDING_B))
    kinds = (LinearSite, ConvSite, EmbeddingSite)

    def settings(self, config: HiraConfig, site: Site) -> HiraSettings:
        check_groups(site, "HiRA")
        return HiraSettings(pattern_value(site.name, config.rank_pattern, config.r), config.hira_dropout)

    def settings_from_shapes(
        self, config: HiraConfig, settings: HiraSettings, site: Site, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[HiraSettings]:
        # peft 0.21 gives the first adapter on a model the rank r everywhere, whatever rank_pattern says.
        return [settings, replace(settings, r=config.r)]

    def shapes(self, settings: HiraSettings, site: Site) -> dict[str, tuple[int, ...]]:
        leaves = (EMBEDDING_A, EMBEDDING_B) if site.looks_up else (A, B)
        return dict(zip(leaves, site.low_rank_shapes(settings.r), strict=True))

    def init(self, new: NewLayer[HiraConfig, HiraSettings]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        down, up = shapes
        if not new.config.init_weights:
            return {leaf: new.normal(shape) for leaf, shape in shapes.items()}
        if new.site.looks_up:
            # As peft has it, "gaussian" too: A at zero and B at random.
            return {down: torch.zeros(shapes[down]), up: new.normal(shapes[up])}
        tensors = new.kaiming(shapes, {up})
        if new.config.init_weights == "gaussian" and new.site.matrix_input:
            tensors[down].normal_(std=1 / new.settings.r, generator=new.generator)
        return tensors

    def lower(self, settings: HiraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        down, up = (tensors[leaf].flatten(1).float() for leaf in self.shapes(settings, base.site))
        if base.site.matrix_input:
            return Patch(dense=HadamardLowRank(base.base_weight(), up, down), dropout=settings.dropout)
        return Patch(dense=base.base_weight().float() * (up @ down), dropout=settings.dropout)


METHOD = Hira()
