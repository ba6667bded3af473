"""WaveFT: few coefficients of the change's wavelet transform (Bilican et al. 2025, arXiv:2505.12532, section 3).

    W' = W + scaling * DWT^-1(S)      S: sparse, with the trained ``waveft_spectrum``, (n,), at seeded places

``S`` has a border as wide as the wavelet's filter takes away, in which no coefficient lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.waveft import WaveFTConfig
from veneer.methods.base.abilities import ChoosesLayers
from veneer.methods.base.leaf import Leaf
from veneer.methods.base.method import BaseLayer, Method, MethodOnSites, NewLayer
from veneer.methods.shared.random_entries import random_places
from veneer.methods.shared.wavelets import between, low_pass
from veneer.patches.operators import Sparse
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

SPECTRUM = "waveft_spectrum"


@dataclass(frozen=True)
class WaveFTSettings:
    """A config's meaning for one layer: the coefficients' places, shape ``(n,)``; no family, no transform."""

    places: Tensor
    scale: float
    family: str | None


class WaveFT(Method[WaveFTConfig, WaveFTSettings], ChoosesLayers):
    """WaveFT on linear layers.

    Args:
        counts: layer's name -> how many coefficients it has, where that depends on the other layers.
    """

    leaves = (Leaf(SPECTRUM),)
    kinds = (LinearSite,)

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts = counts or {}

    def parts(self, config: WaveFTConfig, catalog: Catalog) -> list[MethodOnSites]:
        sites = catalog.sites(config)
        method = self
        if config.proportional_parameters:
            sizes = {site.name: site.shape[0] * site.shape[1] for site in sites}
            budget = config.n_frequency * len(sizes) / sum(sizes.values())
            method = WaveFT({name: max(1, round(size * budget)) for name, size in sizes.items()})
        return [MethodOnSites(method, sites, companions=True)]

    def settings(self, config: WaveFTConfig, site: Site) -> WaveFTSettings:
        count = pattern_value(site.name, config.n_frequency_pattern, config.n_frequency)
        places = random_places(site, self.counts.get(site.name, count), config.random_loc_seed)
        if config.use_idwt:
            low_pass(config.wavelet_family)
        return WaveFTSettings(places, config.scaling, config.wavelet_family if config.use_idwt else None)

    def shapes(self, settings: WaveFTSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {SPECTRUM: tuple(settings.places.shape)}

    def init(self, new: NewLayer[WaveFTConfig, WaveFTSettings]) -> dict[str, Tensor]:
        std = 0.0 if new.config.init_weights else 0.01
        return {SPECTRUM: torch.empty(new.settings.places.shape).normal_(std=std, generator=new.generator)}

    def lower(self, settings: WaveFTSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        rows, columns = base.site.shape
        values = tensors[SPECTRUM].float() * settings.scale
        places = settings.places.to(values.device, torch.int32)
        sparse = Sparse(values, places // columns, places % columns, base.site.shape)
        if settings.family is None:
            return Patch(dense=sparse)
        border = self._border(settings.family, rows, columns)
        return Patch(dense=between(sparse, border, settings.family))

    def _border(self, family: str, rows: int, columns: int) -> tuple[int, int, int, int]:
        """How many zeros lie left, right, above and below the coefficients: even sizes, as much as the filter takes."""
        taken = len(low_pass(family)) - 2
        wide, high = taken + columns % 2, taken + rows % 2
        return wide // 2, wide - wide // 2, high // 2, high - high // 2


METHOD = WaveFT()
