"""PiSSA: begin from the weight's principal directions (Meng et al. 2024, arXiv:2404.02948, section 3).

    W = U S V^T        scale * B A = U_r S_r V_r^T

``"pissa"`` takes the exact decomposition, ``"pissa_niter_[n]"`` the fast one of the paper's appendix, with ``n``
iterations of a randomised method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.methods.lora_starts.start import StartLayer
from veneer.patches.low_rank import balanced, truncated


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``B``."""
    layer.check_rank()
    rounds = layer.how.partition("_niter_")[2]
    if rounds:
        with layer.seeded():
            left, values, columns = torch.svd_lowrank(layer.weight, layer.r, niter=int(rounds))
        up, down = balanced(left, values, columns.T, layer.scale)
    else:
        up, down = truncated(layer.weight, layer.r, layer.scale)
    return down, up
