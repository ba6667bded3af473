"""peft compiles a CUDA extension for its block-diagonal matrices; without it it ignores the butterfly factor."""

from __future__ import annotations

from types import SimpleNamespace

import peft.tuners.boft.layer as peft_boft
import torch
from torch import Tensor, nn

from tests.methods.case import Case


def _block_diagonal(blocks: Tensor) -> Tensor:
    return torch.stack([torch.block_diag(*own) for own in blocks])


def without_cuda(model: nn.Module) -> nn.Module:
    """Give peft what its extension would, in torch."""
    peft_boft.get_fbd_cuda = lambda: True
    peft_boft.FastBlockDiag = SimpleNamespace(apply=_block_diagonal)
    return model


CASES = [
    Case("llama", "llama", "BOFTConfig", {"target_modules": ["q_proj", "down_proj"]}, prepare=without_cuda),
    Case(
        "three factors",
        "llama",
        "BOFTConfig",
        {"boft_n_butterfly_factor": 3, "target_modules": ["q_proj", "down_proj"]},
        prepare=without_cuda,
    ),
    Case(
        "bert",
        "bert",
        "BOFTConfig",
        {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 2, "target_modules": ["query", "value"]},
        prepare=without_cuda,
    ),
    Case("conv", "conv", "BOFTConfig", {"target_modules": ["conv2", "point", "first"]}, prepare=without_cuda),
]
