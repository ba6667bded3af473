"""Trained rows of single tokens: what may not meet, and what libraries read from the layer."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.models import build, logits, tokens
from tests.random_adapters import adapted, config
from veneer.errors import AdapterError, ConfigError, TargetError


def with_tokens(first: list[int], second: list[int]) -> Any:
    model = adapted(trainable_token_indices=first)
    model.add_adapter("b", config(trainable_token_indices=second), seed=2)
    return model


def test_tokens_of_a_module_that_is_trained_whole_are_refused() -> None:
    with pytest.raises(ConfigError, match="The embedding layer is already marked to be trained fully"):
        adapted(trainable_token_indices=[0, 2], modules_to_save=["embed_tokens"])
    with pytest.raises(TargetError, match=r"Target modules \{'nothing'\} not found in the base model"):
        adapted(trainable_token_indices={"nothing": [0]})


def test_an_embedding_that_nobody_names_is_asked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    with pytest.raises(TargetError, match="Target modules embed_tokens not found in the base model"):
        veneer.get_peft_model(model, veneer.TrainableTokensConfig(token_indices=[1]))


def test_untied_layers_that_are_to_stay_alike_are_told() -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying=True but the model does not have tied weights"):
        adapted(trainable_token_indices=[0, 2], ensure_weight_tying=True)


def test_a_layer_tells_them_by_adapter() -> None:
    model = with_tokens([2, 0], [3])
    layer = model.get_submodule("base_model.model.model.embed_tokens")
    rows = layer.token_adapter.trainable_tokens_delta
    assert {name: tuple(tensor.shape) for name, tensor in rows.items()} == {"default": (2, 32), "b": (1, 32)}
    assert layer.token_indices == {"default": [2, 0], "b": [3]}
    before = logits(model, tokens())
    rows["default"].data = torch.rand_like(rows["default"])
    batch = {"input_ids": torch.tensor([[2, 0, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert torch.equal(model.get_input_embeddings()(batch["input_ids"])[0, :2], rows["default"])
    assert before.shape == logits(model, tokens()).shape
    other = adapted()
    assert not hasattr(other.get_submodule("base_model.model.model.layers.0.self_attn.q_proj"), "token_indices")


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.param = torch.nn.Parameter(torch.zeros(10, 10))

    words = r"Targeting an nn.Parameter on the top-level module is not supported \(parameter 'param'\)"
    with pytest.raises(TargetError, match=words):
        veneer.get_peft_model(Model(), veneer.LoraConfig(target_parameters=["param"]))


def test_a_parameter_tells_its_name_and_a_load_what_is_left(tmp_path: Path) -> None:
    model = adapted(target_parameters=["k_proj.weight"])
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    assert layer.parameter_name == "weight"
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    result: Any = again.load_adapter(tmp_path, adapter_name="second")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_the_same_token_of_two_adapters_is_refused_together() -> None:
    model = with_tokens([2, 0], [0, 3])
    for act in (model.set_adapter, model.merge_adapter, partial(model.merge_and_unload, False, False)):
        with pytest.raises(AdapterError, match=r"both train token 0 of model.embed_tokens .*undefined merging"):
            act(["default", "b"])
    model.merge_adapter(["default"])
    with pytest.raises(AdapterError, match="Only one adapter can be set at a time for TrainableTokensWrapper"):
        model.merge_adapter(["b"])
    apart = with_tokens([2, 0], [3])
    apart.set_adapter(["default", "b"])
    apart.merge_adapter()


def test_tied_layers_hold_the_same_rows_and_answer_for_themselves() -> None:
    model: Any = veneer.get_peft_model(build("gpt2"), config(target_modules=["c_attn"], trainable_token_indices=[3, 1]))
    embedding, output = model.get_submodule("base_model.model.transformer.wte"), model.base_model.model.lm_head
    copied = copy.deepcopy(model).base_model.model
    for layers in ((embedding, output), (copied.transformer.wte, copied.lm_head)):
        one, other = (layer.token_adapter for layer in layers)
        assert one.trainable_tokens_delta["default"] is other.trainable_tokens_delta["default"]
        assert [layer.token_adapter.token_indices for layer in layers] == [{"default": [3, 1]}] * 2
        assert one.base_layer is layers[0].base_layer
    assert embedding.token_adapter.trainable_tokens_delta is output.token_adapter.trainable_tokens_delta
    assert list(copy.deepcopy(embedding).token_adapter.trainable_tokens_delta) == ["default"]
    assert embedding.original_module is embedding.base_layer
    assert output.token_adapter.active_adapter == ["default"]
    assert not hasattr(model.base_model.model.transformer.h[0].attn.c_attn, "original_module")
    assert model.get_submodule("base_model.model.lm_head.token_adapter.trainable_tokens_delta")


def test_a_list_of_tied_weights_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("gpt2")
    monkeypatch.setattr(base, "_tied_weights_keys", ["lm_head.weight"])
    model: Any = veneer.get_peft_model(base, config(target_modules=["c_attn"], trainable_token_indices=[3, 1]))
    merged: Any = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
