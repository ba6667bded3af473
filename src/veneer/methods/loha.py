"""LoHa: low-rank Hadamard product (Hyeon-Woo et al. 2022, "FedPara", arXiv:2108.06098, proposition 1 and 3).

    W' = W + scale * (A1 B1) * (A2 B2)      A: (out, r), B: (r, in), scale = alpha / r

A convolution's two matrices can each be a Tucker decomposition of its kernels instead (proposition 3): a core
``(r, r, k1, k2)`` with A: (r, out) and B: (r, in).

The entrywise product of two matrices of rank r has rank r^2: its factors are all products of a column of A1 with one of
A2, and of a row of B1 with one of B2 (proposition 1). A layer large enough for it applies these, and no whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.loha import LoHaConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.patch_dropout import Drop, of_delta
from veneer.methods.shared.tucker import as_low_rank, core_kernel, tucker
from veneer.patches.patch import Patch

A1, B1, A2, B2 = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
CORE1, CORE2 = "hada_t1", "hada_t2"


@dataclass(frozen=True)
class LoHaSettings:
    """Holds a config's values for one layer; ``core`` has the two last sizes of its cores, if there are any."""

    r: int
    scale: float
    core: tuple[int, int] | None
    drop: Drop | None


class LoHa(Method[LoHaConfig, LoHaSettings]):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(A1), Leaf(B1), Leaf(A2), Leaf(B2), Leaf(CORE1), Leaf(CORE2))
    kinds = (LinearSite, ConvSite)

    def settings(self, config: LoHaConfig, site: Site) -> LoHaSettings:
        r = pattern_value(site.name, config.rank_pattern, config.r)
        alpha = pattern_value(site.name, config.alpha_pattern, config.alpha)
        core = core_kernel(site, config.use_effective_conv2d)
        return LoHaSettings(r, alpha / r, core, of_delta(config.module_dropout, config.rank_dropout, rescale=True))

    def shapes(self, settings: LoHaSettings, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = site.shape
        r = settings.r
        if settings.core is None:
            return {A1: (out, r), B1: (r, inner), A2: (out, r), B2: (r, inner)}
        a, b, core = (r, out), (r, site.channels), (r, r, *settings.core)
        return {A1: a, B1: b, A2: a, B2: b, CORE1: core, CORE2: core}

    def init(self, new: NewLayer[LoHaConfig, LoHaSettings]) -> dict[str, Tensor]:
        return new.kaiming(self.shapes(new.settings, new.site), {B2} if new.config.init_weights else ())

    def lower(self, settings: LoHaSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        if as_low_rank(settings.r**2, base.site):
            up = (tensors[A1].unsqueeze(2) * tensors[A2].unsqueeze(1)).flatten(1)
            down = (tensors[B1].unsqueeze(1) * tensors[B2].unsqueeze(0)).flatten(0, 1)
            return Patch(up=up, down=down, scale=settings.scale, drop=settings.drop)
        if settings.core is None:
            first, second = tensors[A1] @ tensors[B1], tensors[A2] @ tensors[B2]
        else:
            first = tucker(tensors[CORE1], tensors[A1], tensors[B1])
            second = tucker(tensors[CORE2], tensors[A2], tensors[B2])
        dense = (settings.scale * first * second).reshape(base.site.shape)
        return Patch(dense=dense, drop=settings.drop)


METHOD = LoHa()
