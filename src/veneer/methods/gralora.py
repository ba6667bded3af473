"""GraLoRA: granular low-rank adaptation (Jung et al. 2025, arXiv:2505.20355, section 3).

    W' = W + scale * (blocks + B_g A_g)        A: (k, in / k, r), B: (k, r, out / k)

The weight is cut into ``k * k`` blocks. Block ``(j, n)``, of output part ``j`` and input part ``n``, changes by
``B[j, n-th r / k rows]^T A[n, j-th r / k columns]^T``, of rank ``r / k``. As one product this is ``U V`` with ``k r``
inner entries, ``V`` block-diagonal. ``A_g`` and ``B_g`` are a plain LoRA of rank ``hybrid_r``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.gralora import GraloraConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch

A, B = "gralora_A", "gralora_B"
GENERAL_A, GENERAL_B = "gralora_A_general.weight", "gralora_B_general.weight"


class Gralora(Method[GraloraConfig, GraloraConfig]):
    """Adapts linear layers, by the hybrid too."""

    kinds = (LinearSite,)
    leaves = (Leaf(A), Leaf(B), Leaf(GENERAL_A), Leaf(GENERAL_B))

    def settings(self, config: GraloraConfig, site: Site) -> GraloraConfig:
        for name, side in zip(("out_features", "in_features"), site.shape, strict=True):
            if side % config.gralora_k:
                raise UnsupportedError(
                    f"{site.name}: {name} should be divisible by gralora_k, but got {side} and {config.gralora_k}.",
                    hint="Choose another gralora_k, or leave the layer out with exclude_modules.",
                )
        return config

    def shapes(self, settings: GraloraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        (out, inner), k, r, hybrid = site.shape, settings.gralora_k, settings.r, settings.hybrid_r
        shapes: dict[str, tuple[int, ...]] = {A: (k, inner // k, r), B: (k, r, out // k)}
        return {**shapes, GENERAL_A: (hybrid, inner), GENERAL_B: (out, hybrid)} if hybrid else shapes

    def init(self, new: NewLayer[GraloraConfig, GraloraConfig]) -> dict[str, Tensor]:
        tensors = {leaf: torch.zeros(shape) for leaf, shape in self.shapes(new.settings, new.site).items()}
        for leaf, tensor in tensors.items():
            if leaf in (A, GENERAL_A) or not new.config.init_weights:
                # A's columns are the rank: its fan-in is the rows.
                seen = tensor.mT if leaf == A else tensor
                bound = 1 / math.sqrt(seen.shape[-1])
                seen.uniform_(-bound, bound, generator=new.generator)
        return tensors

    def lower(self, settings: GraloraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        k, each = settings.gralora_k, settings.r // settings.gralora_k
        down = torch.block_diag(*tensors[A].mT.unbind())  # rows (n, j, each)
        rows = tensors[B].mT.unflatten(2, (k, each))  # (j, out / k, n, each)
        spread = torch.eye(k, dtype=rows.dtype, device=rows.device)
        up = torch.einsum("jone,ji->jonie", rows, spread).flatten(2).flatten(0, 1)  # columns (n, j, each)
        if GENERAL_A in tensors:
            up, down = torch.cat([up, tensors[GENERAL_B]], 1), torch.cat([down, tensors[GENERAL_A]])
        scale = settings.alpha / (settings.r + settings.hybrid_r)
        return Patch(up=up, down=down, scale=scale, dropout=settings.gralora_dropout)


METHOD = Gralora()
