"""MiCA: learn along the weight's smallest directions (arXiv:2604.01694).

W = U S V^T        B = the last r columns of U, never trained; A = 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.methods.lora_starts.start import StartLayer


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank()
    up, _, _ = torch.linalg.svd(layer.weight, full_matrices=False)
    return torch.zeros(layer.r, layer.weight.shape[1]), up[:, -layer.r :]
