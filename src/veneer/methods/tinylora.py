"""TinyLoRA: a change within the base's own singular vectors (arXiv:2602.04118, section 4).

    W' = W + B (sum_i v_i P_i) A        v: (u,), P: (u, r, r)

``B = U sqrt(S)`` and ``A = sqrt(S) V`` are the first ``r`` singular vectors of ``W``, kept in the checkpoint; ``P`` is
random. Layers in one group share ``v``, the only tensor that is trained. An embedding is decomposed as it is stored, so
that its change is ``(B (sum_i v_i P_i) A)^T``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.tinylora import TinyLoraConfig
from veneer.methods.base.abilities import DerivesTensors, SharesTensors
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.patches.low_rank import truncated
from veneer.patches.patch import Patch

A = "tinylora_A"
B = "tinylora_B"
P = "tinylora_P"
V = "tinylora_v"


class TinyLora(UniformMethod[TinyLoraConfig], SharesTensors, DerivesTensors):
    """Adapts linear layers and embeddings."""

    kinds = (LinearSite, EmbeddingSite)
    leaves = (Leaf(A, trained=False), Leaf(B, trained=False), Leaf(P, trained=False))
    shared = (Leaf(V),)

    def shapes(self, settings: TinyLoraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = _stored_shape(site)
        r = _rank(settings, site)
        shapes: dict[str, tuple[int, ...]] = {A: (r, inner), B: (out, r)}
        return {**shapes, P: (settings.u, r, r)} if settings.save_projection else shapes

    def shared_shapes(self, config: TinyLoraConfig, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        return {f"{V}.{group}": (config.u,) for group in _groups(config, len(sites))}

    def make_shared(
        self, config: TinyLoraConfig, bases: Sequence[BaseLayer], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        shapes, bound = self.shared_shapes(config, [base.site for base in bases]), config.init_v_bound
        if config.init_weights is True:
            return {leaf: torch.zeros(shape) for leaf, shape in shapes.items()}
        return {leaf: torch.empty(s).uniform_(-bound, bound, generator=generator) for leaf, s in shapes.items()}

    def init(self, new: NewLayer[TinyLoraConfig, TinyLoraConfig]) -> dict[str, Tensor]:
        weight = new.base.base_weight().float()
        up, down = truncated(weight.T if new.site.looks_up else weight, _rank(new.settings, new.site))
        return {A: down.contiguous(), B: up.contiguous()}

    def extra_tensors(
        self, config: TinyLoraConfig, bases: Sequence[BaseLayer], shared: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        return [
            {V: shared[f"{V}.{group}"], P: _projection(config, _rank(config, base.site), index)}
            for index, (base, group) in enumerate(zip(bases, _groups(config, len(bases)), strict=True))
        ]

    def lower(self, settings: TinyLoraConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        middle = torch.einsum("u,uij->ij", tensors[V], tensors[P].to(tensors[V].dtype))
        down, up = tensors[A], tensors[B]
        if base.site.looks_up:
            up, down, middle = down.T, up.T, middle.T
        return Patch(up=up @ middle.to(up.dtype), down=down, dropout=settings.tinylora_dropout)


METHOD = TinyLora()


def _stored_shape(site: Site) -> tuple[int, int]:
    out, inner = site.shape
    return (inner, out) if site.looks_up else (out, inner)


def _rank(config: TinyLoraConfig, site: Site) -> int:
    return min(config.r, *site.shape)


def _groups(config: TinyLoraConfig, count: int) -> list[int]:
    """Return the group of each of ``count`` layers."""
    groups = max(1, round(count * (1 - config.weight_tying)))
    size = max(1, count // groups)
    return [min(index // size, groups - 1) for index in range(count)]


def _projection(config: TinyLoraConfig, r: int, index: int) -> Tensor:
    """Return ``P`` of a layer, drawn as peft draws it: normal, of deviation ``1 / sqrt(r)``."""
    seeded = torch.Generator().manual_seed(config.projection_seed + index)
    return torch.normal(0.0, 1 / math.sqrt(r), (config.u, r, r), generator=seeded)
