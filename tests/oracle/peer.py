"""What peft computes and saves, for Veneer to be compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models import CASES, build, gap, inputs, logits
from tests.oracle.options import OPTIONS

WEIGHTS = "adapter_model.safetensors"
# A change that is smaller than this would not show whether it was applied.
VISIBLE = 0.02


@dataclass(frozen=True)
class Peer:
    """One adapter, as peft made it.

    Attributes:
        arch: the architecture's name.
        options: what LoraConfig was given.
        base: the folder of the base model.
        folder: the folder of the adapter; its config names ``base``.
        unmerged: logits with the adapter active.
        merged: logits after peft merged it.
    """

    arch: str
    options: dict[str, Any]
    base: Path
    folder: Path
    unmerged: Tensor
    merged: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / WEIGHTS)


def config_of(folder: Path) -> dict[str, Any]:
    """A saved adapter's config."""
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def save_base(arch: str, folder: Path) -> Path:
    """Save an architecture's model as a folder."""
    build(arch).save_pretrained(folder)
    return folder


def base_model(arch: str, folder: Path) -> nn.Module:
    """A model read from its folder, which it names as its origin."""
    model = type(build(arch)).from_pretrained(folder)
    return model.eval()


def lora_config(arch: str, **options: Any) -> peft.LoraConfig:
    """peft's config with what the architecture needs."""
    return peft.LoraConfig(task_type=CASES[arch].task, **CASES[arch].options, **options)


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give everything that trains random values, so that every adapter has a visible effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def make_peer(arch: str, option: str, base: Path, folder: Path) -> Peer:
    """Let peft make an adapter, save it, apply it and merge it."""
    bare = base_model(arch, base)
    options = OPTIONS[option](CASES[arch], bare)
    before = logits(bare, inputs(arch))
    model = scramble(peft.get_peft_model(bare, lora_config(arch, **options)))
    model.save_pretrained(folder)
    if option == "bfloat16":
        saved = {key: tensor.bfloat16() for key, tensor in load_file(folder / WEIGHTS).items()}
        save_file(saved, folder / WEIGHTS, metadata={"format": "pt"})
        model = peft.PeftModel.from_pretrained(base_model(arch, base), folder)
    after = logits(model, inputs(arch))
    assert gap(after, before) > VISIBLE, f"the adapter changes too little: {gap(after, before):.1e}"
    merged = logits(model.merge_and_unload(), inputs(arch))
    return Peer(arch, options, base, folder, after, merged)
