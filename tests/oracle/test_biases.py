"""``bias="all"`` and ``"<method>_only"`` of every method that has them, against peft: both train the base's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from tests.methods.networks import NETWORKS
from tests.models import gap

NET = NETWORKS["bert"]
TARGETS = ["query", "intermediate.dense"]
OPTIONS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"init_r": 4, "target_r": 4, "total_step": 10},
    "BOFTConfig": {"boft_block_size": 2},
    "C3AConfig": {"block_size": 2},
    "DeftConfig": {"r": 4},
    "DeloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 40},
    "FrodConfig": {"progressbar": False},
    "GloraConfig": {"r": 4, "config_D_E": "vector"},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "HRAConfig": {"r": 4},
    "LoraConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 2, "r": 0},
    "PveraConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "TinyLoraConfig": {"r": 4, "u": 8},
    "UniLoraConfig": {"r": 4},
    "VBLoRAConfig": {"r": 4, "vector_length": 2, "num_vectors": 8, "topk": 2},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 40},
}


def config_for(library: Any, name: str, bias: str) -> Any:
    """A config of either library; ``"only"`` is spelled as the method does."""
    config = getattr(library, name)(target_modules=TARGETS, **OPTIONS[name])
    config.bias = (
        "all" if bias == "all" else f"{str(getattr(config.peft_type, 'value', config.peft_type)).lower()}_only"
    )
    if name == "AdaLoraConfig" and bias == "only":
        config.bias = "lora_only"
    return config


def trained_biases(model: nn.Module) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name.endswith(".bias")}
    return {name.replace(".base_layer", "") for name in names}


@torch.no_grad()
def scrambled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def saved_biases(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in load_file(folder / "adapter_model.safetensors").items() if k.endswith(".bias")}


def test_no_method_is_left_out() -> None:
    kinds = [kind for kind in vars(peft).values() if isinstance(kind, type) and issubclass(kind, peft.PeftConfig)]
    assert {kind.__name__ for kind in kinds if hasattr(kind, "bias")} == OPTIONS.keys()


@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("name", OPTIONS)
def test_biases_are_trained_saved_and_loaded_as_in_peft(name: str, bias: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scrambled(peft.get_peft_model(NET.make(), config_for(peft, name, bias)))
        theirs.save_pretrained(tmp_path / "theirs")
        expected = NET.read(theirs)
    new = veneer.get_peft_model(NET.make(), config_for(veneer, name, bias))
    assert trained_biases(new) == trained_biases(theirs) != set()

    assert gap(NET.read(veneer.PeftModel.from_pretrained(NET.make(), tmp_path / "theirs")), expected) < 1e-5
    ours = veneer.PeftModel.from_pretrained(NET.make(), tmp_path / "theirs", is_trainable=True).eval()
    assert trained_biases(ours) == trained_biases(theirs)
    assert gap(NET.read(ours), expected) < 1e-5

    ours.save_pretrained(tmp_path / "ours")
    mine, yours = saved_biases(tmp_path / "ours"), saved_biases(tmp_path / "theirs")
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[key], tensor) for key, tensor in yours.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = NET.read(peft.PeftModel.from_pretrained(NET.make(), tmp_path / "ours").eval())
    assert gap(again, expected) < 1e-5
    assert gap(NET.read(ours.merge_and_unload()), expected) < 1e-4
