"""AdaLoRA: adaptive low-rank adaptation (Zhang et al. 2023, arXiv:2303.10512, section 3).

    W' = W + alpha / init_r * B diag(e) A      A: (r, in), e: ``lora_E``, (r, 1), B: (out, r)

Training takes those ranks away, over all layers, that matter least (``rank_allocation.py``); a layer may be left with
none. The scale stays that of the rank that each began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.adalora import AdaLoraConfig
from veneer.methods.base.abilities import Allocates, Penalised
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.rank_allocation import A, B, E, RankAllocation
from veneer.methods.shared.rotation import check_groups
from veneer.patches.patch import Patch


@dataclass(frozen=True)
class AdaLoraSettings:
    """Holds a config's values for one layer."""

    r: int
    scale: float
    dropout: float


class AdaLora(Method[AdaLoraConfig, AdaLoraSettings], Penalised, Allocates):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(A), Leaf(B), Leaf(E))
    kinds = (LinearSite, ConvSite)

    def allocation(self, config: AdaLoraConfig) -> RankAllocation | None:
        return None if config.total_step is None else RankAllocation()

    def settings(self, config: AdaLoraConfig, site: Site) -> AdaLoraSettings:
        check_groups(site, "AdaLoRA")
        remaining = (config.rank_pattern or {}).get(f"{site.name}.{E}")
        r = config.init_r if remaining is None else sum(remaining)
        alpha = config.lora_alpha if config.lora_alpha > 0 else r
        # peft's denominator is not quite init_r, and checkpoints were trained with it.
        return AdaLoraSettings(r, alpha / (config.init_r + 1e-5), config.lora_dropout)

    def shapes(self, settings: AdaLoraSettings, site: Site) -> dict[str, tuple[int, ...]]:
        (out, inner), r = site.shape, settings.r
        return {A: (r, inner), B: (out, r), E: (r, 1)}

    def init(self, new: NewLayer[AdaLoraConfig, AdaLoraSettings]) -> dict[str, Tensor]:
        std = 0.02 if new.config.init_lora_weights else 1.0
        shapes = self.shapes(new.settings, new.site).items()
        tensors = {leaf: new.normal(shape, std) for leaf, shape in shapes}
        return {**tensors, E: torch.zeros_like(tensors[E])} if new.config.init_lora_weights else tensors

    def lower(self, settings: AdaLoraSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(up=tensors[B], down=tensors[A] * tensors[E], scale=settings.scale, dropout=settings.dropout)

    def penalty(self, config: AdaLoraConfig, layers: Sequence[tuple[AdaLoraSettings, Mapping[str, Tensor]]]) -> Tensor:
        """Return the distance of the factors from orthogonal ones (equation 4)."""
        factors = [part.float() for _, tensors in layers for part in (tensors[A], tensors[B].mT)]
        gaps = [(f @ f.mT - torch.eye(len(f), device=f.device)).norm().to(factors[0].device) for f in factors]
        return config.orth_reg_weight * torch.stack(gaps).mean()


METHOD = AdaLora()
