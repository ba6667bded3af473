"""OFT: orthogonal finetuning (Qiu et al. 2023, arXiv:2306.07280, section 3).

    W' = W R^T      R: block-diagonal, each block a rotation made of a skew-symmetric S

The rotation is Cayley's, ``(1 - S) (1 + S)^-1``, or (Qiu et al. 2025, arXiv:2506.19847, section 4) the first terms of
the series of ``(1 + S) (1 - S)^-1``, which turns the other way. COFT first draws each S into a ball of radius
``eps / sqrt(blocks)``. Of an embedding the vectors are turned: W' = R^T W for a canonical W, (dim, vocabulary).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.embedding import EmbeddingSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.oft import OFTConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.patch_dropout import of_blocks
from veneer.methods.shared.rotation import cayley, check_groups, neumann, skew_of
from veneer.patches.multipliers import BlockDiagonal
from veneer.patches.patch import Patch

ENTRIES = "oft_R.weight"
EMBEDDING_ENTRIES = "oft_embedding_R.weight"


@dataclass(frozen=True)
class OFTSettings:
    """Holds a config's values for one layer: rotations, their size, the series' terms (0 for Cayley's form)."""

    blocks: int
    size: int
    terms: int
    radius: float | None
    dropout: float


class OFT(Method[OFTConfig, OFTSettings]):
    """Adapts linear layers, convolutions and embeddings, by COFT too."""

    leaves = (Leaf(ENTRIES), Leaf(EMBEDDING_ENTRIES))
    kinds = (LinearSite, ConvSite, EmbeddingSite)

    def settings(self, config: OFTConfig, site: Site) -> OFTSettings:
        check_groups(site, "OFT")
        width = site.shape[0 if site.looks_up else 1]
        size = width // _divisor(width, config.r) if config.r else _divisor(width, config.oft_block_size)
        blocks = 1 if config.block_share else width // size
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        return OFTSettings(blocks, size, terms, config.eps if config.coft else None, config.module_dropout)

    def shapes(self, settings: OFTSettings, site: Site) -> dict[str, tuple[int, ...]]:
        leaf = EMBEDDING_ENTRIES if site.looks_up else ENTRIES
        return {leaf: (settings.blocks, settings.size * (settings.size - 1) // 2)}

    def init(self, new: NewLayer[OFTConfig, OFTSettings]) -> dict[str, Tensor]:
        std = 0.0 if new.config.init_weights else 0.1
        shapes = self.shapes(new.settings, new.site).items()
        return {leaf: new.normal(shape, std) for leaf, shape in shapes}

    def lower(self, settings: OFTSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        [entries] = tensors.values()
        skew = skew_of(entries.float(), settings.size)
        if settings.radius is not None:
            skew = _drawn_in(skew, settings.radius)
        turned = BlockDiagonal((neumann(skew, settings.terms) if settings.terms else cayley(skew)).mT)
        if base.site.looks_up:
            return Patch(outer=turned)
        return Patch(inner=turned, drop=of_blocks(settings.dropout))


METHOD = OFT()


def _drawn_in(skew: Tensor, eps: float) -> Tensor:
    """Return ``skew`` with each block at most ``eps / sqrt(blocks)`` long; the gradient is that of ``skew`` itself."""
    radius = eps / len(skew) ** 0.5
    with torch.no_grad():
        length = skew.norm(dim=(1, 2), keepdim=True)
        change = torch.where(length > radius, skew * (radius / length.clamp_min(1e-30)) - skew, torch.zeros_like(skew))
    return skew + change


def _divisor(width: int, target: int) -> int:
    """Return the divisor of ``width`` nearest to ``target``, the smaller of two; ``width`` if ``target`` is larger."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: (abs(n - target), n)) if target < width else width
