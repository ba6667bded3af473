"""What a model says of its layers and of itself, beside what peft says."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor, nn

import veneer
from tests.models import build
from tests.random_adapters import adapted, config, saved


def two() -> veneer.PeftModel:
    model = adapted("llama")
    model.add_adapter("other", config("llama", target_modules=["q_proj"]))
    return model


def test_a_layer_says_what_is_on_it() -> None:
    model = two()
    layers = {layer.name: layer for layer in model.get_layer_status()}
    query = layers["model.model.layers.0.self_attn.q_proj"]
    assert (query.module_type, query.enabled) == ("lora.Linear", True)
    assert query.available_adapters == ["default", "other"]
    assert query.active_adapters == ["default"]
    assert query.requires_grad == {"default": True, "other": False}
    assert query.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert layers["model.model.layers.0.mlp.down_proj"].available_adapters == ["default"]


def test_the_model_says_what_holds_for_all() -> None:
    model = two()
    model.set_adapter(["other", "default"])
    model.merge_adapter(["other"])
    status = model.get_model_status()
    assert status.merged_adapters == ["other"]
    assert status.active_adapters == model.active_adapters
    assert status.peft_types == {"default": "LORA", "other": "LORA"}
    assert status.num_adapter_layers == 6
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    with model.disable_adapter():
        inside = model.get_model_status()
    model.disable_adapters()
    for status in (inside, model.get_model_status()):
        assert (status.enabled, status.active_adapters) == (False, ["other"])


def test_what_is_not_the_same_everywhere_is_irregular() -> None:
    model = two()
    layer = model.adapters.layers["model.layers.0.self_attn.q_proj"]
    next(iter(model.adapters.parameters("default"))).requires_grad_(False)
    assert model.get_model_status().requires_grad["default"] == "irregular"
    layer.merge_adapters(("default",))
    assert model.get_model_status().merged_adapters == "irregular"


@pytest.mark.oracle
def test_as_peft_says(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build("llama"), folder)
    ours = veneer.PeftModel.from_pretrained(build("llama"), folder)
    mine, other = ours.get_model_status(), theirs.get_model_status()
    for name in ("base_model_type", "trainable_params", "total_params", "num_adapter_layers", "enabled"):
        assert getattr(mine, name) == getattr(other, name), name
    for name in ("active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices", "peft_types"):
        assert getattr(mine, name) == getattr(other, name), name
    assert [asdict(layer) for layer in ours.get_layer_status()] == [
        asdict(layer) for layer in theirs.get_layer_status()
    ]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb0, self.conv0 = nn.Embedding(10, 8), nn.Conv2d(8, 8, 3)
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x


OPTIONS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": ["emb0", "conv0", "lin0"], "modules_to_save": ["lin1"]},
    "LoraConfig, tokens": {"target_modules": ["lin0"], "trainable_token_indices": {"emb0": [1, 2]}},
    "LoraConfig, parameters": {"target_parameters": ["lin0.weight"], "target_modules": ["lin1"]},
    "LoraConfig, biases": {"target_modules": ["lin0"], "bias": "all"},
    "TrainableTokensConfig": {"target_modules": ["emb0"], "token_indices": [1]},
    "LoHaConfig": {"target_modules": ["lin0", "conv0"]},
    "BOFTConfig": {"target_modules": ["lin0"]},
    "VeraConfig": {"target_modules": ["lin0"]},
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", OPTIONS)
def test_layers_and_methods_are_named_as_in_peft(case: str) -> None:
    kind, options = case.partition(",")[0], OPTIONS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(Net(), getattr(peft, kind)(**options))
    ours = veneer.get_peft_model(Net(), getattr(veneer, kind)(**options))
    assert [asdict(layer) for layer in ours.get_layer_status()] == [
        asdict(layer) for layer in theirs.get_layer_status()
    ]
    mine, other = ours.get_model_status(), theirs.get_model_status()
    assert mine.adapter_model_type == other.adapter_model_type
    assert mine.num_adapter_layers == other.num_adapter_layers


def test_a_prompt_is_on_no_layer() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    assert model.get_layer_status() == []
    assert model.get_model_status().adapter_model_type == "PeftModelForCausalLM"
