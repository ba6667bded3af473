"""FourierFT: few coefficients of the change's Fourier transform (Gao et al. 2024, arXiv:2405.03003, section 3.1).

W' = W + scaling * Re(F^-1(S))      S: sparse, with the trained ``fourierft_spectrum``, (n,), at seeded places
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.base_model.targets import pattern_value
from veneer.configs.methods.fourierft import FourierFTConfig
from veneer.methods.base.leaf import Leaf
from veneer.methods.base.method import BaseLayer, Method, NewLayer
from veneer.methods.shared.random_entries import random_places
from veneer.patches.operators import Sparse, SparseInTransform
from veneer.patches.patch import Patch

SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True)
class FourierFTSettings:
    """The coefficients' places on one layer, shape ``(n,)``, and the scale of the change."""

    places: Tensor
    scale: float


class FourierFT(Method[FourierFTConfig, FourierFTSettings]):
    """FourierFT on linear layers."""

    leaves = (Leaf(SPECTRUM),)
    kinds = (LinearSite,)

    def settings(self, config: FourierFTConfig, site: Site) -> FourierFTSettings:
        count = pattern_value(site.name, config.n_frequency_pattern, config.n_frequency)
        return FourierFTSettings(random_places(site, count, config.random_loc_seed), config.scaling)

    def shapes(self, settings: FourierFTSettings, site: Site) -> dict[str, tuple[int, ...]]:
        return {SPECTRUM: tuple(settings.places.shape)}

    def init(self, new: NewLayer[FourierFTConfig, FourierFTSettings]) -> dict[str, Tensor]:
        std = 0.0 if new.config.init_weights else 1.0
        return {SPECTRUM: torch.empty(new.settings.places.shape).normal_(std=std, generator=new.generator)}

    def lower(self, settings: FourierFTSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        values, shape = tensors[SPECTRUM].float(), base.site.shape
        places = settings.places.to(values.device, torch.int32)
        sparse = Sparse(values, places // shape[1], places % shape[1], shape)

        def outer(spectrum: Tensor) -> Tensor:
            found: Tensor = torch.fft.ifft(spectrum)
            return found.real * settings.scale

        def matrix(spectrum: Tensor) -> Tensor:
            found: Tensor = torch.fft.ifft2(spectrum)
            return found.real * settings.scale

        return Patch(dense=SparseInTransform(sparse, torch.fft.ifft, outer, matrix))


METHOD = FourierFT()
