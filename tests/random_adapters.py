"""Adapters for tests: made here, with random weights that visibly change the output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.models import BUILT, build

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def config(arch: str = "llama", **options: Any) -> veneer.LoraConfig:
    """A LoRA config for an architecture, its start random instead of zero."""
    case = BUILT[arch]
    chosen = {"r": 4, "target_modules": list(case.targets), "init_lora_weights": False, "task_type": case.task}
    return veneer.LoraConfig(**{**chosen, **case.options, **options})


def adapted(arch: str = "llama", seed: int = 1, **options: Any) -> veneer.PeftModel:
    """A model with one adapter whose change is large enough to see."""
    model = veneer.get_peft_model(build(arch), config(arch, **options), seed=seed).eval()
    enlarge(model, "default", seed)
    return model


def enlarge(model: veneer.PeftModel, name: str, seed: int = 1) -> None:
    """Give an adapter's tensors values of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def saved(folder: Path, arch: str = "llama", seed: int = 1, **options: Any) -> Path:
    """A folder with an adapter."""
    adapted(arch, seed, **options).save_pretrained(folder)
    return folder


def saved_base(folder: Path, arch: str = "llama") -> Path:
    """A folder with the base model."""
    model: Any = build(arch)
    model.save_pretrained(folder)
    return folder


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Name -> a copy of each tensor of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of an adapter's config; ``...`` removes one."""
    path = folder / CONFIG
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change an adapter's tensors."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
