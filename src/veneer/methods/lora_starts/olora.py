"""OLoRA: begin from an orthonormal basis of the weight's columns (Büyükakyüz 2024, arXiv:2406.01775, section 3).

W = Q R        B = Q_r, A = R_r: the first r columns and rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.methods.lora_starts.start import StartLayer


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank()
    basis, rest = torch.linalg.qr(layer.weight)
    return rest[: layer.r], basis[:, : layer.r]
