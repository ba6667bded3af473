"""BEFT: bias-efficient fine-tuning (Huang et al. 2025, arXiv:2509.15974).

b' = b + c      c: (1, out); a layer without a bias gets one when the adapter is merged
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.beft import BeftConfig
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.patch import Patch

SHIFT = "beft_bias"


class Beft(Method[BeftConfig, None]):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(SHIFT, moves_bias=True),)
    kinds = (LinearSite, ConvSite)

    def settings(self, config: BeftConfig, site: Site) -> None:
        return None

    def shapes(self, settings: None, site: Site) -> dict[str, tuple[int, ...]]:
        return {SHIFT: (1, site.shape[0])}

    def init(self, new: NewLayer[BeftConfig, None]) -> dict[str, Tensor]:
        std = 0.0 if new.config.init_weights else 1.0
        return {SHIFT: new.normal((1, new.site.shape[0]), std)}

    def lower(self, settings: None, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        return Patch(shift=tensors[SHIFT].flatten())


METHOD = Beft()
