"""DEFT: decompositional efficient fine-tuning (NeurIPS 2025, section 3), and PaRa.

    W' = (1 - Q M^T) W + s * Q R = W + Q (s * R - M^T W)        Q, M: (out, r), R: (r, in)

``Q = P`` and ``M = relu(P)``, or both are the orthogonal factor of ``P``. PaRa (Chen et al. 2024, arXiv:2406.05641) has
no ``R``. ``R`` starts at ``M^T W / s``: nothing changes. Dropout acts on the input of the whole change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.deft import DeftConfig
from veneer.methods.base.method import BaseLayer, Leaf, NewLayer, UniformMethod
from veneer.patches.patch import Patch

P, R = "deft_P", "deft_R"


class Deft(UniformMethod[DeftConfig]):
    """Adapts linear layers, by PaRa too."""

    kinds = (LinearSite,)
    leaves = (Leaf(P), Leaf(R))

    def shapes(self, settings: DeftConfig, site: Site) -> dict[str, tuple[int, ...]]:
        out, inner = site.shape
        r = _rank(settings, site)
        return {P: (out, r)} if settings.para else {P: (out, r), R: (r, inner)}

    def init(self, new: NewLayer[DeftConfig, DeftConfig]) -> dict[str, Tensor]:
        shapes = self.shapes(new.settings, new.site)
        tensors = {P: new.normal(shapes[P], 0.02)}
        if R in shapes and new.config.init_weights:
            _, measure = _projector(new.settings, tensors[P])
            weight = new.base.base_weight().float()
            tensors[R] = measure.to(weight.device).T @ weight / _scale(new.settings, new.site)
        elif R in shapes:
            tensors[R] = new.normal(shapes[R], 0.02 * new.config.init_scale)
        return tensors

    def lower(self, settings: DeftConfig, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        up, measure = _projector(settings, tensors[P].float())
        down = -(measure.T @ base.base_weight().float())
        if R in tensors:
            down = down + tensors[R].float() * _scale(settings, base.site)
        return Patch(up=up, down=down, dropout=settings.deft_dropout)


METHOD = Deft()


def _rank(settings: DeftConfig, site: Site) -> int:
    return min(settings.r, site.shape[0])


def _scale(settings: DeftConfig, site: Site) -> float:
    return settings.alpha / _rank(settings, site) if settings.alpha else 1.0


def _projector(settings: DeftConfig, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Q`` and ``M``."""
    if settings.decomposition_method == "relu":
        return directions, directions.relu()
    turned = torch.linalg.qr(directions)[0]
    return turned, turned
