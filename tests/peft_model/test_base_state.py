"""The base's own tensors, read and set under the names that they have without adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import veneer
from tests.models import build

LORA = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
KINDS = {
    "lora": ("llama", veneer.LoraConfig(**LORA)),
    "tied": ("gpt2", veneer.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)),
    "shared modules": ("t5", veneer.LoraConfig(target_modules=["q", "v"], init_lora_weights=False)),
    "prompt": ("llama", veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "frozen tensors": ("llama", veneer.VeraConfig(target_modules=["q_proj"])),
}


def adapted(kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    model, config = build(KINDS[kind][0]), KINDS[kind][1]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, veneer.get_peft_model(model, config)


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_state_of_the_base_alone(kind: str) -> None:
    state, model = adapted(kind)
    assert same(veneer.get_base_model_state_dict(model), state)


def test_it_is_the_base_s_while_adapters_are_merged() -> None:
    state, model = adapted("lora")
    model.merge_adapter()
    assert same(veneer.get_base_model_state_dict(model), state)
    with pytest.raises(veneer.MergeError, match="unmerge_adapter"):
        veneer.set_base_model_state_dict(model, state)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_set_is_read_back(kind: str) -> None:
    state, model = adapted(kind)
    other = {name: tensor.clone().mul_(2) for name, tensor in state.items()}
    assert veneer.set_base_model_state_dict(model, other) == ([], [])
    assert same(veneer.get_base_model_state_dict(model), other)
    assert model.base_digest is None


def test_names_and_shapes_that_do_not_fit_are_told() -> None:
    state, model = adapted("lora")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = state.pop(name)
    with pytest.raises(veneer.BindError, match=f"Missing keys: 1 .{name}.. Unexpected keys: 1 .nothing"):
        veneer.set_base_model_state_dict(model, {**state, "nothing": weight})
    assert veneer.set_base_model_state_dict(model, {**state, "nothing": weight}, strict=False) == ([name], ["nothing"])
    with pytest.raises(veneer.BindError, match="size mismatch for model"):
        veneer.set_base_model_state_dict(model, {**state, name: weight[:1]})
