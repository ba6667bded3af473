"""C3A: circular convolution adaptation (Chen et al. 2024, arXiv:2407.19342, section 3.3).

W' = W + C / in      C: circulant blocks, C_mn[j, i] = k_mn[(i - j) mod size]; k: (out / size, in / size, size)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.c3a import C3AConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.operators import Circulant
from veneer.patches.patch import Patch

KERNEL = "c3a_kernel"


class C3A(Method[C3AConfig, int]):
    """Adapts linear layers; its settings are the size of a block."""

    leaves = (Leaf(KERNEL),)
    kinds = (LinearSite,)

    def settings(self, config: C3AConfig, site: Site) -> int:
        size: int = pattern_value(site.name, config.block_size_pattern, config.block_size)
        for name, width in (("input", site.shape[1]), ("output", site.shape[0])):
            if width % size:
                raise UnsupportedError(
                    f"{site.name}: The block size should be a factor of the {name} size. However, the {name} size is "
                    f"{width} and the block size is {size}.",
                    hint=f"block_size={size}: choose one that divides both, for single layers with block_size_pattern.",
                )
        return size

    def shapes(self, settings: int, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = site.shape
        return {KERNEL: (out // settings, inner // settings, settings)}

    def init(self, new: NewLayer[C3AConfig, int]) -> dict[str, Tensor]:
        kernel = torch.zeros(self.shapes(new.settings, new.site)[KERNEL])
        if new.config.init_weights == "gaussian":
            kernel.normal_(generator=new.generator)
        elif new.config.init_weights is not True:
            # Bounds as for the whole change: the kernel's own shape says nothing of the layer's.
            out, inner = new.site.shape
            bound = math.sqrt(1 / inner if new.config.init_weights == "kaiming_uniform" else 6 / (inner + out))
            kernel.uniform_(-bound, bound, generator=new.generator)
        return {KERNEL: kernel}

    def lower(self, settings: int, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(dense=Circulant(tensors[KERNEL].float() / base.site.shape[1]))


METHOD = C3A()
