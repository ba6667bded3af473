"""RoAd: 2D rotary adaptation (Liao & Monz 2024, arXiv:2409.00119, section 3.2, equation 4).

    W' = R W, b' = R b      R: pairs of outputs, each by a matrix [[a cos t, -a sin t], [a sin t, a cos t]]

``t`` is ``road_theta`` and ``a`` is ``road_alpha``: one of each for a pair (road_1), for each row of its matrix
(road_2), or for each number of its matrix (road_4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.methods.road import VARIANTS, RoadConfig
from veneer.errors import UnsupportedError
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.multipliers import BlockDiagonal
from veneer.patches.patch import Patch

THETA = "road_theta"
ALPHA = "road_alpha"


@dataclass(frozen=True)
class RoadSettings:
    """Holds the count of numbers that each pair of outputs has in either tensor, and the size of a group."""

    numbers: int
    group: int


class Road(Method[RoadConfig, RoadSettings]):
    """Adapts linear layers."""

    leaves = (Leaf(THETA), Leaf(ALPHA))
    kinds = (LinearSite,)

    def settings(self, config: RoadConfig, site: Site) -> RoadSettings:
        if site.shape[0] % config.group_size:
            raise UnsupportedError(
                f"{site.name}: The out_features of the base layer must be divisible by group_size "
                f"({config.group_size}) when using RoadLayer. It has {site.shape[0]}.",
                hint=f"group_size={config.group_size}: choose one that divides the outputs of every target.",
            )
        return RoadSettings(VARIANTS[config.variant], config.group_size)

    def shapes(self, settings: RoadSettings, site: Site) -> dict[str, tuple[int, ...]]:
        shape = (site.shape[0] // 2 * settings.numbers,)
        return {THETA: shape, ALPHA: shape}

    def init(self, new: NewLayer[RoadConfig, RoadSettings]) -> dict[str, Tensor]:
        std = 0.0 if new.config.init_weights else 0.5
        shapes = self.shapes(new.settings, new.site)
        tensors = {leaf: new.normal(shape, std) for leaf, shape in shapes.items()}
        return {THETA: tensors[THETA], ALPHA: tensors[ALPHA] + 1}

    def lower(self, settings: RoadSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        half = settings.group // 2
        angle, scale = (self._by_row(settings, tensors[leaf].float()) for leaf in (THETA, ALPHA))
        diagonal, off_diagonal = scale[0] * angle[0].cos(), scale[1] * angle[1].sin()
        # The partner is subtracted from an output of a group's first half, and added to one of the second.
        signs = torch.ones(settings.group, 1, device=diagonal.device)
        signs[:half] = -1
        partner = torch.eye(settings.group, device=diagonal.device).roll(half, dims=1) * signs
        return Patch(
            outer=BlockDiagonal(torch.diag_embed(diagonal) + off_diagonal.unsqueeze(-1) * partner), outer_on_bias=True
        )

    def _by_row(self, settings: RoadSettings, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values for an output itself and for its partner, each ``(groups, group)``."""
        group = settings.group
        if settings.numbers == 4:
            diagonal, off_diagonal = values.view(-1, 2, group).unbind(1)
            return diagonal, off_diagonal
        rows = values.view(-1, group // 2).repeat(1, 2) if settings.numbers == 1 else values.view(-1, group)
        return rows, rows


METHOD = Road()
