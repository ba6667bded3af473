"""(IA)3: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638, 3.3).

W' = diag(l) W, b' = l * b    on most layers, l: (out,)
W' = W diag(l)                on feed-forward layers, l: (in,), or (channels,) of a convolution
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.base_model.default_targets import default_feedforward
from veneer.base_model.sites.conv import ConvSite
from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import names_match
from veneer.configs.methods.ia3 import IA3Config
from veneer.methods.base.abilities import CompletesConfig, SettledByCheckpoint
from veneer.methods.base.method import BaseLayer, Leaf, Method, NewLayer
from veneer.patches.multipliers import Diagonal
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

SCALE = "ia3_l"


@dataclass(frozen=True)
class IA3Settings:
    """Tells whether the input is scaled, else the output."""

    feedforward: bool


class IA3(Method[IA3Config, IA3Settings], CompletesConfig, SettledByCheckpoint):
    """Adapts linear layers and convolutions."""

    leaves = (Leaf(SCALE),)
    kinds = (LinearSite, ConvSite)

    def complete(self, config: IA3Config, catalog: Catalog) -> None:
        if config.feedforward_modules is not None:
            return
        catalog.write_out_targets(config, catalog.targets(config))
        usual, targets = default_feedforward(catalog.model_type), config.target_modules
        scaled = [name for name in catalog.targets(config) if names_match(name, usual)]
        names = usual if isinstance(targets, str) else targets
        config.feedforward_modules = {
            name for name in names or () if any(names_match(layer, [name]) for layer in scaled)
        }

    def settings(self, config: IA3Config, site: Site) -> IA3Settings:
        return IA3Settings(names_match(site.name, config.feedforward_modules))

    def settings_from_shapes(
        self, config: IA3Config, settings: IA3Settings, site: Site, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[IA3Settings]:
        # The usual choice is in a file that was saved, and not in a config that a user gives instead of it.
        unsaid = config.feedforward_modules is None
        return [settings, IA3Settings(not settings.feedforward)] if unsaid else [settings]

    def shapes(self, settings: IA3Settings, site: Site) -> dict[str, tuple[int, ...]]:
        if site.kernel:
            size = site.channels * site.groups if settings.feedforward else site.shape[0]
            return {SCALE: (1, size, *site.point)}
        return {SCALE: (1, site.shape[1]) if settings.feedforward else (site.shape[0], 1)}

    def init(self, new: NewLayer[IA3Config, IA3Settings]) -> dict[str, Tensor]:
        shape = self.shapes(new.settings, new.site)[SCALE]
        start = torch.ones(shape) if new.config.init_ia3_weights else new.normal(shape)
        return {SCALE: start}

    def lower(self, settings: IA3Settings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        scale = tensors[SCALE].flatten()
        if not settings.feedforward:
            return Patch(outer=Diagonal(scale), outer_on_bias=True)
        return _of_channels(scale, base) if base.site.kernel else Patch(inner=Diagonal(scale))


METHOD = IA3()


def _of_channels(scale: Tensor, base: BaseLayer) -> Patch:
    """Return the patch of a convolution whose input channels are scaled by ``scale`` (channels,)."""
    groups, (out, inner) = base.site.groups, base.site.shape
    # One entry a channel, and the canonical weight has a column for each entry of its kernel.
    columns = scale.repeat_interleave(inner * groups // len(scale))
    if groups == 1:
        return Patch(inner=Diagonal(columns))
    # The rows of another group see other channels.
    gains = columns.view(groups, inner).repeat_interleave(out // groups, dim=0)
    return Patch(dense=base.base_weight().float() * (gains.float() - 1))
