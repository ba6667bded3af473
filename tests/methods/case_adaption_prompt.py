from __future__ import annotations

import torch
from torch import Tensor

from tests.methods.case import Case


def _opened(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """A gate must be open far enough for its vectors to show."""
    return parameter + (2 if "gate" in name else 0.2) * torch.randn(parameter.shape, generator=generator)


OPTIONS = {"adapter_len": 5, "task_type": "CAUSAL_LM"}

CASES = [
    Case(
        "grouped keys, the upper layer",
        "llama",
        "AdaptionPromptConfig",
        {**OPTIONS, "adapter_layers": 1},
        merges=False,
        scramble=_opened,
        lora_targets=["q_proj", "k_proj", "o_proj"],
    ),
    Case(
        "all layers, named",
        "gpt2",
        "AdaptionPromptConfig",
        {**OPTIONS, "adapter_layers": 2, "target_modules": "attn"},
        merges=False,
        scramble=_opened,
        lora_targets=["c_attn"],
    ),
]
