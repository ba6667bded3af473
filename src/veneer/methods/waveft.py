"""WaveFT: few coefficients of the change's wavelet transform (Bilican et al. 2025, arXiv:2505.12532, section 3).

    W' = W + scaling * DWT^-1(S)      S: sparse, with the trained ``waveft_spectrum``, (n,), at seeded places

``S`` has a border as wide as the wavelet's filter takes away, in which no coefficient lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.configs.methods.waveft import WaveFTConfig
from veneer.methods.base.abilities import ChoosesLayers
from veneer.methods.base.method import BaseLayer, Leaf, MethodOnSites
from veneer.methods.shared.sparse_spectrum import SparseSpectrum, SpectrumSettings
from veneer.methods.shared.wavelets import between, low_pass
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.base_model.catalog import Catalog

SPECTRUM = "waveft_spectrum"


class WaveFT(SparseSpectrum[WaveFTConfig], ChoosesLayers):
    """Adapts linear layers.

    Args:
        counts: layer's name -> the number of its coefficients, where that depends on the other layers.
    """

    name, std = SPECTRUM, 0.01
    leaves = (Leaf(SPECTRUM),)

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

    def count(self, config: WaveFTConfig, site: Site) -> int:
        return self.counts.get(site.name) or super().count(config, site)

    def settings(self, config: WaveFTConfig, site: Site) -> SpectrumSettings:
        settings = super().settings(config, site)
        if not config.use_idwt:
            return settings
        low_pass(config.wavelet_family)
        return replace(settings, family=config.wavelet_family)

    def lower(self, settings: SpectrumSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        rows, columns = base.site.shape
        spectrum = settings.spectrum(tensors[SPECTRUM].float() * settings.scale, base.site.shape)
        if settings.family is None:
            return Patch(dense=spectrum)
        border = self._border(settings.family, rows, columns)
        return Patch(dense=between(spectrum, border, settings.family))

    def _border(self, family: str, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Return the widths of the zero border, left, right, above, below: even sums, as much as the filter takes."""
        taken = len(low_pass(family)) - 2
        wide, high = taken + columns % 2, taken + rows % 2
        return wide // 2, wide - wide // 2, high // 2, high - high // 2


METHOD = WaveFT()
