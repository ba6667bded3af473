"""An independent reading of MLX-LM's layout: the change of each weight in float64, from the files alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor


def mlx_changes(folder: Path) -> dict[str, Tensor]:
    """Module of MLX -> ``(out, in)``, ``(experts, out, in)``, or of an embedding ``(vocabulary, dim)``."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale, rank = config["lora_parameters"]["scale"], config["lora_parameters"]["rank"]
    tensors = load_file(folder / "adapters.safetensors")
    changes = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_a"):
            continue
        module = key.removesuffix(".lora_a")
        b = tensors[f"{module}.lora_b"].astype(np.float64)
        assert a.flags.c_contiguous
        if a.ndim == 3:
            assert a.shape[1] == b.shape[2] == rank
            change = np.einsum("eor,eri->eoi", b, a.astype(np.float64))
        else:
            assert a.shape[1] == b.shape[0] == rank
            product = a.astype(np.float64) @ b
            change = product if module.endswith("embed_tokens") else product.T
        changes[module] = torch.from_numpy(scale * change)
    return changes
