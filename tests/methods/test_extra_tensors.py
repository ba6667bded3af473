"""Tensors that are no layer's own share: common ones, and frozen ones that config and base tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import veneer
from tests.models import build, inputs, logits
from tests.random_adapters import bits, enlarge, same_bits
from veneer.errors import BindError

OPTIONS = {"target_modules": ["q_proj", "down_proj"], "u": 8, "weight_tying": 0.5, "save_projection": False}


def _model() -> veneer.PeftModel:
    model = veneer.get_peft_model(build("llama"), veneer.TinyLoraConfig(**OPTIONS), seed=1).eval()
    enlarge(model, "default")
    return model


def test_they_are_named_as_in_peft() -> None:
    names = dict(_model().named_parameters())
    assert names["base_model.model.model.layers.0.self_attn.q_proj.tinylora_v.default.1"].requires_grad
    assert not names["base_model.model.model.layers.1.self_attn.q_proj.tinylora_P.default"].requires_grad


def test_a_renamed_adapter_keeps_them() -> None:
    model = _model()
    expected = logits(model, inputs("llama"))
    model.adapters.rename("default", "other")
    assert torch.equal(logits(model, inputs("llama")), expected)
    assert not [name for name, _ in model.named_parameters() if ".default" in name]


def test_a_deleted_adapter_takes_them_along() -> None:
    base = bits(build("llama"))
    model = _model()
    model.adapters.delete("default")
    assert same_bits(bits(model.adapters.model), base)


def test_a_cast_reaches_them() -> None:
    model = _model().bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_one_of_a_group_too_many_is_named(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    more = veneer.TinyLoraConfig.from_pretrained(tmp_path)
    more.weight_tying = 1.0  # type: ignore[attr-defined]
    more.save_pretrained(tmp_path)
    with pytest.raises(BindError, match=r"tinylora_v\.1: in the checkpoint, and this model and config have no such"):
        veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
