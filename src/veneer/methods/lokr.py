"""LoKr: low-rank Kronecker product (Yeh et al. 2024, "LyCORIS", arXiv:2309.14859, section 3.2).

    W' = W + scale * kron(C, D)     C: (a, c), D: (b, d), a * b = out, c * d = in, scale = alpha / r

Either factor is held whole or, where the rank is small enough to save anything, as a product of two: C = C1 C2 and
D = D1 D2. Of a convolution D holds the kernels too: whole ``(b, d, k1, k2)``, a product ``(b, r) (r, d * k1 * k2)``,
or a Tucker decomposition.

A linear layer's change is applied factor by factor, and made whole only to be merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.lokr import LoKrConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.methods.shared.patch_dropout import Drop, of_delta
from veneer.methods.shared.tucker import core_kernel, tucker
from veneer.patches.operators import Kronecker
from veneer.patches.patch import Patch

C, C1, C2 = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
D, D1, D2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b"
CORE = "lokr_t2"


@dataclass(frozen=True)
class LoKrSettings:
    """Holds a config's values for one layer: the sizes of C and D, and whether each is held whole."""

    r: int
    scale: float
    first: tuple[int, int]
    second: tuple[int, int]
    whole_first: bool
    whole_second: bool
    core: tuple[int, int] | None
    drop: Drop | None


class LoKr(Method[LoKrConfig, LoKrSettings]):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(C), Leaf(C1), Leaf(C2), Leaf(D), Leaf(D1), Leaf(D2), Leaf(CORE))
    kinds = (LinearSite, ConvSite)

    def settings(self, config: LoKrConfig, site: Site) -> LoKrSettings:
        r = pattern_value(site.name, config.rank_pattern, config.r)
        alpha = pattern_value(site.name, config.alpha_pattern, config.alpha)
        (a, b), (c, d) = (factorization(size, config.decompose_factor) for size in (site.shape[0], site.channels))
        whole_first = not (config.decompose_both and r < max(a, c) / 2)
        drop = of_delta(config.module_dropout, config.rank_dropout, config.rank_dropout_scale)
        core = core_kernel(site, config.use_effective_conv2d)
        return LoKrSettings(r, alpha / r, (a, c), (b, d), whole_first, r >= max(b, d) / 2, core, drop)

    def shapes(self, settings: LoKrSettings, site: Site) -> dict[str, tuple[int, ...]]:
        r, (a, c), (b, d) = settings.r, settings.first, settings.second
        shapes: dict[str, tuple[int, ...]] = {C: (a, c)} if settings.whole_first else {C1: (a, r), C2: (r, c)}
        if settings.whole_second:
            return {**shapes, D: (b, d, *site.kernel)}
        if settings.core is None:
            return {**shapes, D1: (b, r), D2: (r, d * math.prod(site.kernel))}
        return {**shapes, D1: (r, b), D2: (r, d), CORE: (r, r, *settings.core)}

    def init(self, new: NewLayer[LoKrConfig, LoKrSettings]) -> dict[str, Tensor]:
        zero = {D, D2} if new.config.init_weights == "lycoris" else {C, C1}
        return new.kaiming(self.shapes(new.settings, new.site), zero if new.config.init_weights else ())

    def lower(self, settings: LoKrSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        first = tensors[C] if settings.whole_first else tensors[C1] @ tensors[C2]
        if settings.whole_second:
            second = tensors[D]
        elif settings.core is None:
            second = tensors[D1] @ tensors[D2]
        else:
            second = tucker(tensors[CORE], tensors[D1], tensors[D2])
        if base.site.matrix_input:
            return Patch(dense=Kronecker(settings.scale * first, second), drop=settings.drop)
        if second.ndim == 4:
            first = first[..., None, None]
        # With a whole D of one spatial dimension peft pairs C with the last two of its three, which is no product of
        # the kernels; it was trained to mean that.
        dense = settings.scale * torch.kron(first, second.contiguous()).reshape(base.site.shape)
        return Patch(dense=dense, drop=settings.drop)


METHOD = LoKr()


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return two numbers with the product ``size``: first ``factor`` where it divides that, else a smaller near it.

    With ``factor`` -1 they are as near to each other as they can be.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    smaller = max((n for n in range(1, limit + 1) if size % n == 0), default=1)
    return smaller, size // smaller
