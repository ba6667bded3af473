"""KaSA: knowledge-aware singular-value adaptation (Wang et al. 2024, arXiv:2412.06071, section 3).

    W' = W (1 - V^T V) + scale * B diag(d) A        V: (r, in), d: (r,)

The rows of ``V`` are the right singular vectors of ``W``'s r smallest singular values: what lies along them is taken
for noise and given up. ``V`` is in no checkpoint and worked out again from the base, which itself is left as it is.
Training adds ``beta sum(d^2) + gamma (||B^T B - 1|| + ||A A^T - 1||)`` for each layer to the loss (equations 9 to 11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.configs.lora_variant_options import KasaConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.method import Leaf
from veneer.methods.lora_variants.variant import LORA_A, LORA_B, Variant
from veneer.patches.multipliers import IdentityPlusLowRank
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.methods.base.method import BaseLayer


VALUES = "lora_diag"
GIVEN_UP = "lora_given_up"


@dataclass(frozen=True)
class Kasa(Variant):
    """Scales each rank, and takes the weight's smallest directions away."""

    r: int
    beta: float
    gamma: float
    leaves = (Leaf(VALUES), Leaf(GIVEN_UP, trained=False, saved=False))

    @classmethod
    def on(cls, site: Site, r: int, options: KasaConfig) -> Kasa:
        """Return the variant on a layer, which must have more directions than it loses."""
        if r >= min(site.shape):
            raise UnsupportedError(
                f"{site.name}: KaSA requires `r` < min{tuple(site.shape)}, and r is {r}: nothing would be left of it.",
                hint="Lower r, or leave the layer out with exclude_modules.",
            )
        return cls(r, options.beta, options.gamma)

    def shapes(self, plain: Mapping[str, tuple[int, ...]], site: Site) -> dict[str, tuple[int, ...]]:
        return {**plain, VALUES: (self.r,)}

    def init(self, base: BaseLayer, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {VALUES: torch.randn(self.r, generator=generator), **self.recomputed(lambda: base)}

    def recomputed(self, base: Callable[[], BaseLayer]) -> dict[str, Tensor]:
        right: Tensor = torch.linalg.svd(base().base_weight().float(), full_matrices=False)[2]
        return {GIVEN_UP: right[-self.r :].contiguous()}

    def patch(self, plain: Patch, tensors: Mapping[str, Tensor]) -> Patch:
        assert plain.down is not None
        removed = tensors[GIVEN_UP]
        return replace(
            plain, down=tensors[VALUES].unsqueeze(1) * plain.down, inner=IdentityPlusLowRank(-removed.T, removed)
        )

    def penalty(self, layers: Sequence[Mapping[str, Tensor]]) -> Tensor:
        terms = [
            self.beta * tensors[VALUES].float().square().sum()
            + self.gamma * (_gap(tensors[LORA_A].float()) + _gap(tensors[LORA_B].float().T))
            for tensors in layers
        ]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _gap(rows: Tensor) -> Tensor:
    """Return the distance of ``rows`` from orthonormal ones."""
    gap: Tensor = torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device))
    return gap
