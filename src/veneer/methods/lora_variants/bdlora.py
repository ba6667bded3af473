"""BD-LoRA: LoRA with one block-diagonal factor (Wang et al. 2025, arXiv:2510.23346, section 3).

    W' = W + scale * B diag(A_1, ..., A_n)    or    W + scale * diag(B_1, ..., B_n) A

On disk the blocks lie below each other: A is (r, in / n), B is (out, r / n). A layer that several devices hold in
columns has such a B, one that they hold in rows such an A, and then no device needs what another has computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.configs.lora_variant_options import BdLoraConfig
from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.lora_variants.variant import LORA_A, LORA_B, Variant
from veneer.patches.patch import Patch


@dataclass(frozen=True)
class BdLora(Variant):
    """Makes one factor, ``leaf``, block-diagonal."""

    leaf: str
    blocks: int

    def shapes(self, plain: Mapping[str, tuple[int, ...]], site: Site) -> dict[str, tuple[int, ...]]:
        rows, columns = plain[self.leaf]
        if rows % self.blocks or columns % self.blocks:
            raise UnsupportedError(
                f"{site.name}: {self.leaf} of shape ({rows}, {columns}) is not divisible by nblocks={self.blocks}.",
                hint="Choose another nblocks or r, or leave the layer out with exclude_modules.",
            )
        return {**plain, self.leaf: (rows, columns // self.blocks)}

    def patch(self, plain: Patch, tensors: Mapping[str, Tensor]) -> Patch:
        name, stored = ("down", plain.down) if self.leaf == LORA_A else ("up", plain.up)
        assert stored is not None
        return replace(plain, **{name: torch.block_diag(*stored.chunk(self.blocks))})


def block_diagonal(options: BdLoraConfig, site: Site, r: int) -> BdLora | None:
    """Return the variant on a layer; ``None`` on one that ``options`` leaves a plain LoRA."""
    leaf_name = site.name.rpartition(".")[2]
    blocked = [
        leaf
        for leaf, parts in ((LORA_A, options.target_modules_bd_a), (LORA_B, options.target_modules_bd_b))
        if any(part in leaf_name for part in parts or ())
    ]
    if len(blocked) == 2 or (options.match_strict and not blocked):
        raise ConfigError(
            f"use_bdlora: {site.name} matches {'both A and B' if blocked else 'neither A nor B'} block-diagonal "
            "patterns (target_modules_bd_a, target_modules_bd_b).",
            hint="Name it in one of them." if blocked else "Name it in one, or set match_strict=False.",
        )
    return BdLora(blocked[0], options.nblocks) if blocked else None
