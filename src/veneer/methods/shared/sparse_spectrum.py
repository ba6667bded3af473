"""Few trained coefficients of a transform of the change, at seeded places: FourierFT and WaveFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.fourierft import FourierFTConfig
from veneer.configs.methods.waveft import WaveFTConfig
from veneer.methods.base.method import Method, NewLayer
from veneer.methods.shared.random_entries import random_places
from veneer.patches.operators import Sparse

SpectrumConfigT = TypeVar("SpectrumConfigT", FourierFTConfig, WaveFTConfig)


@dataclass(frozen=True)
class SpectrumSettings:
    """The coefficients' places on one layer, shape ``(n,)``, the change's scale, and the wavelet's family if any."""

    places: Tensor
    scale: float
    family: str | None = None

    def spectrum(self, values: Tensor, shape: tuple[int, int]) -> Sparse:
        """Return the whole spectrum of a change of that shape, with ``values`` at the places."""
        places = self.places.to(values.device, torch.int32)
        return Sparse(values, places // shape[1], places % shape[1], shape)


class SparseSpectrum(Method[SpectrumConfigT, SpectrumSettings]):
    """Trains few coefficients of the change's transform on linear layers.

    Attributes:
        name: the coefficients' tensor.
        std: the deviation of new coefficients that do not start at zero.
    """

    kinds = (LinearSite,)
    name: str
    std: float

    def count(self, config: SpectrumConfigT, site: Site) -> int:
        """Return the number of a layer's coefficients."""
        count: int = pattern_value(site.name, config.n_frequency_pattern, config.n_frequency)
        return count

    def settings(self, config: SpectrumConfigT, site: Site) -> SpectrumSettings:
        return SpectrumSettings(random_places(site, self.count(config, site), config.random_loc_seed), config.scaling)

    def shapes(self, settings: SpectrumSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {self.name: tuple(settings.places.shape)}

    def init(self, new: NewLayer[SpectrumConfigT, SpectrumSettings]) -> dict[str, Tensor]:
        return {self.name: new.normal(new.settings.places.shape, 0.0 if new.config.init_weights else self.std)}
