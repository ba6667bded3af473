"""The attributes and methods of peft's layers, on Veneer's, against the same on peft's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from tests.models import build, inputs, logits

OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def both(**options: Any) -> list[Any]:
    """The same two adapters on peft's model and on Veneer's, with the same values."""
    models = []
    for library in (peft, veneer):
        model = library.get_peft_model(build("llama"), library.LoraConfig(**OPTIONS, **options))
        model.add_adapter("b", library.LoraConfig(**{**OPTIONS, "r": 8}, **options))
        models.append(model.eval())
    models[1].load_state_dict(models[0].state_dict())
    return models


def layers(model: Any) -> list[Any]:
    attention = [block.self_attn for block in model.get_base_model().model.layers]
    return [layer for block in attention for layer in (block.q_proj, block.v_proj)]


def each(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def on(model: Any) -> None:
        for layer in layers(model):
            change(layer)

    return on


def assign(layer: Any) -> None:
    layer.scaling["default"] = 0.25


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda layer: layer.set_adapter("b"),
    "set_adapter, both": lambda layer: layer.set_adapter(["default", "b"]),
    "enable_adapters": lambda layer: layer.enable_adapters(False),
    "set_scale": lambda layer: layer.set_scale("default", 3.0),
    "scale_layer": lambda layer: layer.scale_layer(0.5),
    "unscale_layer": lambda layer: (layer.scale_layer(0.5), layer.unscale_layer(0.25)),
    "unscale_layer, all": lambda layer: (layer.scale_layer(0.5), layer.unscale_layer()),
    "scaling": assign,
    "merge": lambda layer: layer.merge(),
    "merge, named": lambda layer: layer.merge(safe_merge=True, adapter_names=["b"]),
    "merge, unmerge": lambda layer: (layer.merge(), layer.unmerge()),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_all_layers_answers_as_with_peft(name: str) -> None:
    batch, answers, states = inputs("llama"), [], []
    for model in both():
        each(CHANGES[name])(model)
        answers.append(logits(model, batch))
        layer = layers(model)[0]
        states.append([layer.merged_adapters, layer.scaling, layer.r, layer.active_adapters, layer.disable_adapters])
    if name != "merge, named":  # whose adapter is not active: peft's merged layers have it all the same
        assert torch.allclose(*answers, atol=1e-5)
    assert states[0] == states[1]


@pytest.mark.oracle
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"use_dora": True}])
def test_lora_s_attributes_are_those_of_peft(options: dict[str, Any]) -> None:
    models = both(**options)
    theirs, ours = (layers(model)[0] for model in models)
    for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
    assert str(ours.lora_dropout) == str(theirs.lora_dropout)
    assert list(ours.lora_A) == list(theirs.lora_A)
    assert isinstance(ours.get_base_layer(), torch.nn.Linear)


def test_merging_what_is_merged_warns_and_changes_nothing() -> None:
    model = both()[1]
    layer = layers(model)[0]
    layer.merge()
    with pytest.warns(veneer.VeneerWarning, match="already merged"):
        layer.merge()
    assert layer.merged_adapters == ["default"]


def test_a_merge_that_is_not_finite_is_refused() -> None:
    model = both()[1]
    layer = layers(model)[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(veneer.MergeError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_a_bias_that_is_not_finite_is_named() -> None:
    model: Any = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.BeftConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.beft_bias["default"].fill_(float("inf"))
    with pytest.raises(veneer.MergeError, match="NaNs detected in the merged bias"):
        layer.merge(safe_merge=True)


@pytest.mark.parametrize(
    ("layer", "features"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (nn.Embedding(7, 4), (7, 4)),
        (nn.Conv2d(4, 6, 3), (4, 6)),
        (Conv1D(6, 2), (2, 6)),
    ],
)
def test_a_layer_tells_its_features_as_peft_s_does(layer: nn.Module, features: tuple[int, int]) -> None:
    for library in (peft, veneer):
        base, turned = nn.Sequential(copy.deepcopy(layer)), isinstance(layer, Conv1D)
        config = library.LoraConfig(target_modules=["0"], fan_in_fan_out=turned)
        adapted: Any = library.get_peft_model(base, config)
        made = adapted.base_model.model[0]
        assert (made.in_features, made.out_features) == features


def test_an_ia3_tells_whether_it_scales_the_input() -> None:
    config = veneer.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model: Any = veneer.get_peft_model(build("llama"), config)
    block = model.base_model.model.model.layers[0]
    assert block.mlp.down_proj.is_feedforward
    assert not block.self_attn.q_proj.is_feedforward
    assert not hasattr(layers(both()[1])[0], "is_feedforward")


def test_deleting_on_one_layer_deletes_it_from_the_model() -> None:
    model = both()[1]
    layers(model)[0].delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    layers(model)[1].delete_adapter("b")


def test_a_layer_without_lora_has_no_scaling() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert not hasattr(model.get_base_model().model.layers[0].self_attn.q_proj, "scaling")


def test_an_output_layer_shows_the_factors_of_the_embedding_that_it_follows() -> None:
    config = veneer.LoraConfig(r=4, target_modules=["wte"], ensure_weight_tying=True)
    model: Any = veneer.get_peft_model(build("gpt2"), config)
    model.add_adapter("b", veneer.LoraConfig(r=4, target_modules=["c_attn"]))
    embedding, output = model.base_model.model.transformer.wte, model.base_model.model.lm_head
    with torch.no_grad():
        output.lora_B["default"].weight.normal_()
    assert torch.equal(embedding.lora_embedding_A["default"], output.lora_B["default"].weight.T)
    assert output.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    assert not hasattr(embedding, "lora_A")
    assert list(model.base_model.model.transformer.h[0].attn.c_attn.lora_A) == ["b"]


def test_a_module_that_is_brought_whole_counts_its_own_adapters() -> None:
    model: Any = veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"]))
    options: Any = {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}
    model.add_adapter("b", veneer.LoraConfig(target_modules=["q_proj"], **options))
    base = model.get_base_model()
    wrappers = [base.lm_head, base.model.embed_tokens, base.model.layers[0].self_attn.q_proj]
    assert [wrapper.active_adapters for wrapper in wrappers] == [[], [], ["default"]]
    model.set_adapter("b")
    assert [wrapper.active_adapters for wrapper in wrappers] == [["b"], ["b"], ["b"]]


def test_a_layer_by_itself_takes_an_adapter_for_each_row() -> None:
    model = both()[1]
    layer, x = layers(model)[0], torch.randn(3, 5, 32)
    rows = layer(x, adapter_names=["b", "__base__", "default"])
    for row, name in enumerate(["b", "__base__", "default"]):
        with model.disable_adapter() if name == "__base__" else model.using(name):
            assert torch.allclose(layer(x[row : row + 1]), rows[row : row + 1], atol=1e-6)
