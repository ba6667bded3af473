"""The status of a model, asked of functions."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build
from tests.random_adapters import adapted
from veneer.errors import BaseModelError

SHARED = ("trainable_params", "total_params", "num_adapter_layers", "enabled", "active_adapters", "merged_adapters")


def test_they_answer_as_the_methods_do() -> None:
    model = adapted()
    compiled: Any = torch.compile(model, backend="eager")
    for asked in (model, compiled):
        assert veneer.get_layer_status(asked) == model.get_layer_status()
        assert veneer.get_model_status(asked) == model.get_model_status()


@pytest.mark.oracle
def test_they_answer_as_those_of_peft() -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    ours = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**options))
    theirs: Any = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    status, expected = veneer.get_model_status(ours), peft.get_model_status(theirs)
    assert {name: getattr(status, name) for name in SHARED} == {name: getattr(expected, name) for name in SHARED}
    names = [layer.name for layer in veneer.get_layer_status(ours)]
    assert names == [layer.name for layer in peft.get_layer_status(theirs)]


def test_a_model_without_adapters_is_refused() -> None:
    for ask in (veneer.get_layer_status, veneer.get_model_status):
        with pytest.raises(BaseModelError, match="no model with adapters"):
            ask(build("llama"))


@pytest.mark.oracle
def test_the_base_in_a_model_answers_by_its_own_names() -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    ours = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**options))
    theirs: Any = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    status, expected = veneer.get_model_status(ours.get_base_model()), peft.get_model_status(theirs.get_base_model())
    assert {name: getattr(status, name) for name in SHARED} == {name: getattr(expected, name) for name in SHARED}
    layers = veneer.get_layer_status(ours.get_base_model())
    assert [layer.name for layer in layers] == [layer.name for layer in peft.get_layer_status(theirs.get_base_model())]
    assert ours.get_base_model().get_submodule(layers[0].name).active_adapters == ["default"]
