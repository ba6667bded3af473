"""BOFT: orthogonal finetuning by butterfly factorisation (Liu et al. 2024, arXiv:2311.06243, section 4).

    W' = diag(s) W (R_m ... R_1)^T      R_i = P_i B_i P_i^T; B_i block-diagonal, s: (out,)

Each block of ``B_i`` is a rotation: Cayley's transform of its matrix's skew-symmetric part. ``P_i`` brings entries
together that lie ``2^i`` blocks apart, so that a product of few sparse rotations mixes all. The bias is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.boft import BOFTConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.abilities import SettledByCheckpoint
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.patch_dropout import of_blocks
from veneer.methods.shared.rotation import cayley, check_groups
from veneer.patches.multipliers import BlockDiagonal, Diagonal, FullMatrix, Multiplier
from veneer.patches.patch import Patch

R = "boft_R"
S = "boft_s"


@dataclass(frozen=True)
class BOFTSettings:
    """Holds a config's values for one layer: the number of sparse rotations, their blocks, and the size of a block."""

    factors: int
    blocks: int
    size: int
    dropout: float


class BOFT(Method[BOFTConfig, BOFTSettings], SettledByCheckpoint):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(R), Leaf(S))
    kinds = (LinearSite, ConvSite)

    def settings(self, config: BOFTConfig, site: Site) -> BOFTSettings:
        check_groups(site, "BOFT")
        width, factors = site.shape[1], config.boft_n_butterfly_factor
        size = config.boft_block_size or width // config.boft_block_num
        apart = 2 ** (factors - 1)
        if size == 0 or width % (config.boft_block_num or size) or width % (size * apart) or (apart > 1 and size % 2):
            raise UnsupportedError(
                f"{site.name} has {width} inputs, which cannot be cut into blocks as the config of this BOFT says.",
                hint="Let boft_block_size divide it; with a boft_n_butterfly_factor n above 1 let it be even, and "
                "2^(n - 1) times it divide the inputs.",
            )
        return BOFTSettings(factors, width // size, size, config.boft_dropout)

    def settings_from_shapes(
        self, config: BOFTConfig, settings: BOFTSettings, site: Site, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[BOFTSettings]:
        # Where peft cannot compile its CUDA extension it makes one factor, whatever the config says.
        return [settings, replace(settings, factors=1)]

    def shapes(self, settings: BOFTSettings, site: Site) -> dict[str, tuple[int, ...]]:
        out = site.shape[0]
        scale = (1, out) if site.kernel else (out, 1)
        return {R: (settings.factors, settings.blocks, settings.size, settings.size), S: scale}

    def init(self, new: NewLayer[BOFTConfig, BOFTSettings]) -> dict[str, Tensor]:
        std = 0.0 if new.config.init_weights else 0.1
        shapes = self.shapes(new.settings, new.site)
        tensors = {leaf: new.normal(shape, std) for leaf, shape in shapes.items()}
        return {R: tensors[R], S: tensors[S] + 1}

    def lower(self, settings: BOFTSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        blocks = tensors[R].float()
        turned = _product(cayley((blocks - blocks.mT) / 2))
        return Patch(inner=turned, outer=Diagonal(tensors[S].flatten()), drop=of_blocks(settings.dropout))


METHOD = BOFT()


def _product(rotations: Tensor) -> Multiplier:
    """Return ``(R_m ... R_1)^T`` from the blocks of each ``B_i``, shape ``(m, blocks, size, size)``."""
    if len(rotations) == 1:
        return BlockDiagonal(rotations[0].mT)
    count, size = rotations.shape[1:3]
    total = torch.eye(count * size, device=rotations.device)
    for index, blocks in enumerate(rotations):
        order = _brought_together(count * size, size, index).to(rotations.device)
        # (P B P^T)[i, j] = B[order[i], order[j]]
        total = torch.block_diag(*blocks)[order][:, order] @ total
    return FullMatrix(total.mT)


def _brought_together(width: int, size: int, index: int) -> Tensor:
    """Return the order of ``P_i``: in each stretch of ``2^i`` blocks the even half-blocks come before the odd ones."""
    halves = torch.arange(width).view(-1, 2 * 2**index, size // 2) if index else torch.arange(width).view(1, 1, width)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten() if index else halves.flatten()
