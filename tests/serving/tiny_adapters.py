"""Adapters on disk for tests of the server's registry and store: two small tensors, made without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"


def write_adapter(
    folder: Path, seed: int = 0, *, rank: int = 2, metadata: Mapping[str, str] | None = None, **config: Any
) -> Path:
    """Write a LoRA whose numbers come from ``seed``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    tensors = {A: generator.random((rank, 8), np.float32), B: generator.random((8, rank), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors", dict(metadata or {}))
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
