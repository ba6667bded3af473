"""Orthogonal: begin with both factors random, and ``B A = 0`` because their inner spaces are orthogonal.

The rows of a random orthogonal ``(r, r)`` matrix are dealt in turn to ``A`` and ``B``, whence an even rank:

    A = (X Q_odd)^T / 10,  B = Y Q_even / 10        X: (in, r / 2), Y: (out, r / 2), normal
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.lora_starts.start import StartLayer


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    if layer.r % 2:
        raise ConfigError(
            f"{layer.name}: Orthogonal initialization requires the LoRA rank to be even, got {layer.r} instead.",
            hint="Choose an even r, and even values in rank_pattern.",
        )
    out, inner = layer.weight.shape
    half = layer.r // 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=layer.generator)

    basis, _ = torch.linalg.qr(normal(layer.r, layer.r))
    return (normal(inner, half) @ basis[0::2]).T / 10, normal(out, half) @ basis[1::2] / 10
