"""What a model says of its layers and of itself, beside what peft says."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest

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
    query = layers["model.layers.0.self_attn.q_proj"]
    assert (query.module_type, query.enabled) == ("Linear", True)
    assert query.available_adapters == ["default", "other"]
    assert query.active_adapters == ["default"]
    assert query.requires_grad == {"default": True, "other": False}
    assert query.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert layers["model.layers.0.mlp.down_proj"].available_adapters == ["default"]


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
    model.disable_adapters()
    assert not model.get_model_status().enabled


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
    names = {layer.name: layer.available_adapters for layer in ours.get_layer_status()}
    assert names == {layer.name.removeprefix("model."): layer.available_adapters for layer in theirs.get_layer_status()}
