"""FourierFT: few coefficients of the change's Fourier transform (Gao et al. 2024, arXiv:2405.03003, section 3.1).

W' = W + scaling * Re(F^-1(S))      S: sparse, with the trained ``fourierft_spectrum``, (n,), at seeded places
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.configs.methods.fourierft import FourierFTConfig
from veneer.methods.base.method import BaseLayer, Leaf
from veneer.methods.shared.sparse_spectrum import SparseSpectrum, SpectrumSettings
from veneer.patches.operators import SparseInTransform
from veneer.patches.patch import Patch

SPECTRUM = "fourierft_spectrum"


class FourierFT(SparseSpectrum[FourierFTConfig]):
    """Adapts linear layers."""

    name, std = SPECTRUM, 1.0
    leaves = (Leaf(SPECTRUM),)

    def lower(self, settings: SpectrumSettings, tensors: Mapping[str, Tensor], base: BaseLayer) -> Patch:
        spectrum = settings.spectrum(tensors[SPECTRUM].float(), base.site.shape)

        def outer(part: Tensor) -> Tensor:
            transformed: Tensor = torch.fft.ifft(part)
            return transformed.real * settings.scale

        def matrix(part: Tensor) -> Tensor:
            transformed: Tensor = torch.fft.ifft2(part)
            return transformed.real * settings.scale

        return Patch(dense=SparseInTransform(spectrum, torch.fft.ifft, outer, matrix))


METHOD = FourierFT()
