"""HRA: Householder reflection adaptation (Yuan et al. 2024, arXiv:2405.17484, section 3).

    W' = W H_1 H_2 ... H_r      H_i = 1 - 2 u_i u_i^T, each u_i of length 1: a column of u, (in, r)

The chain is ``1 - u T u^T`` with a triangular T, the inverse of ``1/2 + (what of u^T u lies above its diagonal)``
(Joffrain et al. 2006, doi:10.1145/1141885.1141886), so it costs two products with u. With Gram-Schmidt T is 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.hra import HRAConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.rotation import check_groups
from veneer.patches.multipliers import IdentityPlusLowRank
from veneer.patches.patch import Patch

U = "hra_u"


class HRA(Method[HRAConfig, HRAConfig]):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(U),)
    kinds = (LinearSite, ConvSite)

    def settings(self, config: HRAConfig, site: Site) -> HRAConfig:
        check_groups(site, "HRA")
        return config

    def shapes(self, settings: HRAConfig, site: Site) -> dict[str, tuple[int, ...]]:
        return {U: (site.shape[1], settings.r)}

    def init(self, new: NewLayer[HRAConfig, HRAConfig]) -> dict[str, Tensor]:
        width, r = new.site.shape[1], new.config.r
        if new.config.init_weights and r % 2 == 0:
            return {U: new.kaiming({U: (width, r // 2)})[U].repeat_interleave(2, dim=1)}
        return new.kaiming({U: (width, r)})

    def lower(self, settings: HRAConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        u = tensors[U].float()
        if settings.apply_GS:
            u = _orthonormal(u)
            return Patch(inner=IdentityPlusLowRank(-2 * u, u.mT))
        u = _unit(u)
        half = torch.eye(u.shape[1], device=u.device) / 2
        inverse = (u.mT @ u).triu(1) + half
        return Patch(inner=IdentityPlusLowRank(-u, torch.linalg.solve_triangular(inverse, u.mT, upper=True)))


METHOD = HRA()


def _unit(u: Tensor) -> Tensor:
    """Return the columns at length 1; one of zeros, which has no direction and reflects nothing, stays as it is."""
    length = u.norm(dim=0)
    return u / torch.where(length > 0, length, 1.0)


def _orthonormal(u: Tensor) -> Tensor:
    """Return the columns made orthonormal one after the other; one of zeros stays as it is."""
    columns: list[Tensor] = []
    for column in u.unbind(1):
        rest = column
        for previous in columns:
            rest = rest - (previous @ rest) * previous
        columns.append(_unit(rest))
    return torch.stack(columns, dim=1)
