"""MiCA: learn along the weight's smallest directions (arXiv:2604.01694).

W = U S V^T        B = the last r columns of U, never trained; A = 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.lora_starts.start import StartLayer


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    if layer.r > min(layer.weight.shape):
        raise ConfigError(
            f"{layer.name}: MiCA requires `r` <= min{tuple(layer.weight.shape)}, and r is {layer.r}.",
            hint="Lower r, or give this layer a lower rank with rank_pattern.",
        )
    up, _, _ = torch.linalg.svd(layer.weight, full_matrices=False)
    return torch.zeros(layer.r, layer.weight.shape[1]), up[:, -layer.r :]
