"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, section 4).

    W' = W + scale * B A        A: (r, in), B: (out, r)

``scale`` is ``alpha / r``; rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) takes ``alpha / sqrt(r)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.config import LoraConfig, PeftType
from veneer.errors import UnsupportedError
from veneer.methods.method import Method
from veneer.patch import Patch
from veneer.site import Site
from veneer.targets import pattern_value

A = "lora_A.weight"
B = "lora_B.weight"


@dataclass(frozen=True)
class LoraSettings:
    """A config's meaning for one layer."""

    r: int
    scale: float
    dropout: float


class Lora(Method[LoraConfig, LoraSettings]):
    """LoRA and rsLoRA on layers with a matrix for a weight."""

    peft_type = PeftType.LORA.value
    leaves = (A, B)

    def settings(self, config: LoraConfig, name: str) -> LoraSettings:
        r = pattern_value(name, config.rank_pattern, config.r)
        alpha = pattern_value(name, config.alpha_pattern, config.lora_alpha)
        scale = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        return LoraSettings(r=r, scale=scale, dropout=config.lora_dropout)

    def shapes(self, settings: LoraSettings, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        out, inner = shape
        return {A: (settings.r, inner), B: (out, settings.r)}

    def init(
        self, config: LoraConfig, settings: LoraSettings, site: Site, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        shapes = self.shapes(settings, site.shape)
        start = config.init_lora_weights
        down = torch.empty(shapes[A], dtype=torch.float32)
        up = torch.zeros(shapes[B], dtype=torch.float32)
        if start == "gaussian":
            down.normal_(std=1 / settings.r, generator=generator)
        elif isinstance(start, bool) or start is None:
            torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        else:
            raise UnsupportedError(
                f"init_lora_weights={start!r} is not available for new adapters in this version of Veneer.",
                hint='Use True, "gaussian" or False.',
            )
        if start is False:
            up.normal_(std=0.02, generator=generator)
        return {A: down, B: up}

    def lower(self, settings: LoraSettings, tensors: Mapping[str, Tensor]) -> Patch:
        return Patch(up=tensors[B], down=tensors[A], scale=settings.scale, dropout=settings.dropout)
