"""GLoRA: generalised LoRA (Chavan et al. 2023, arXiv:2306.07967, section 3.2).

    W' = W + W * A + B        b' = b + b * D + E + W C

``A`` and ``B`` multiply and shift the weight entry by entry, ``D`` and ``E`` the bias, and ``C``, ``(in, 1)``, puts a
share of the weight into the bias. Each is low-rank (``Xd Xu``), a vector, one number, or nothing. A layer without a
bias has no ``C``, ``D``, ``E``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.glora import GloraConfig
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.patches.operators import HadamardLowRank
from veneer.patches.patch import Patch

A, B, C, D, E = (f"glora_{part}" for part in "ABCDE")
DOWN, UP, PLAIN = ".Xd", ".Xu", ".X"


class Glora(UniformMethod[GloraConfig]):
    """Adapts linear layers."""

    kinds = (LinearSite,)
    leaves = (
        *(Leaf(part + form) for part in (A, B, C, D, E) for form in (DOWN, UP, PLAIN)),
        # What is "none" stands in peft's checkpoints as zeros.
        *(Leaf(part + ".zeros", loaded=False) for part in (A, B, C, D, E)),
    )

    def shapes(self, settings: GloraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        (out, inner), r = site.shape, settings.r
        shapes = {**_shapes(A, settings.config_A_B, out, inner, r), **_shapes(B, settings.config_A_B, out, inner, r)}
        if site.bias is not None:
            shapes.update(_shapes(C, settings.config_C, inner, 1, r))
            for part in (D, E):
                shapes.update(
                    {leaf: shape[:1] for leaf, shape in _shapes(part, settings.config_D_E, out, 1, r).items()}
                )
        return shapes

    def init(self, new: NewLayer[GloraConfig, GloraConfig]) -> dict[str, Tensor]:
        tensors = {leaf: torch.zeros(shape) for leaf, shape in self.shapes(new.settings, new.site).items()}
        for leaf, tensor in tensors.items():
            if leaf.endswith(UP):
                torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=new.generator)
            elif not new.config.init_weights:
                tensor.normal_(std=0.02, generator=new.generator)
        return tensors

    def lower(self, settings: GloraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        patch = self._of_weight(tensors, base)
        parts = [_part(tensors, part) for part in (C, D, E)]
        if base.base_bias is None or all(part is None for part in parts):
            return patch
        bias = base.base_bias.float()
        share, scale, added = parts
        shift = torch.zeros_like(bias) if scale is None or added is None else bias * scale + added
        if share is not None:
            shift = shift + (base.base_weight().float() @ share).squeeze(1)
        return replace(patch, shift=shift)

    def _of_weight(self, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        if A + DOWN in tensors:
            entries = HadamardLowRank(base.base_weight(), tensors[A + DOWN].float(), tensors[A + UP].float())
            return Patch(up=tensors[B + DOWN], down=tensors[B + UP], dense=entries)
        scale, added = _part(tensors, A), _part(tensors, B)
        if scale is None or added is None:
            return Patch()
        return Patch(dense=(base.base_weight().float() * scale + added).expand(base.site.shape))


METHOD = Glora()


def _shapes(part: str, form: str, rows: int, columns: int, r: int) -> dict[str, tuple[int, ...]]:
    if form == "lora":
        return {part + DOWN: (rows, r), part + UP: (r, columns)}
    return {} if form == "none" else {part + PLAIN: (rows, 1) if form == "vector" else (1,)}


def _part(tensors: Mapping[str, Tensor], part: str) -> Tensor | None:
    """Return a part in a shape that broadcasts to what it acts on."""
    if part + DOWN in tensors:
        return tensors[part + DOWN].float() @ tensors[part + UP].float()
    return tensors[part + PLAIN].float() if part + PLAIN in tensors else None
