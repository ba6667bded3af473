"""Tensors that are no layer's own share: common ones, and frozen ones that config and base tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build, inputs, logits
from tests.random_adapters import bits, enlarge, same_bits
from veneer.errors import BindError
from veneer.patches.watched_parameters import Watched

OPTIONS = {"target_modules": ["q_proj", "down_proj"], "u": 8, "weight_tying": 0.5, "save_projection": False}


def _model() -> veneer.PeftModel:
    model = veneer.get_peft_model(build("llama"), veneer.TinyLoraConfig(**OPTIONS), seed=1).eval()
    enlarge(model, "default")
    return model


def test_they_are_named_as_in_peft() -> None:
    model = _model()
    trained = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_v.default.1"
    assert dict(model.named_parameters())[trained].requires_grad
    frozen = "base_model.model.model.layers.1.self_attn.q_proj.tinylora_P.default"
    assert frozen in dict(model.named_buffers())
    assert (frozen in model.state_dict()) is OPTIONS["save_projection"]
    assert all(p.requires_grad for n, p in model.named_parameters() if "tinylora" in n)


def test_a_renamed_adapter_keeps_them() -> None:
    model = _model()
    expected = logits(model, inputs("llama"))
    model.adapters.rename("default", "other")
    assert torch.equal(logits(model, inputs("llama")), expected)
    assert not [n for n in (*model.state_dict(), *dict(model.named_buffers())) if ".default" in n]
    assert not [name for name in model.state_dict() if "tinylora_P" in name]


def test_a_deleted_adapter_takes_them_along() -> None:
    base = bits(build("llama"))
    model = _model()
    model.adapters.delete("default")
    assert same_bits(bits(model.adapters.model), base)


def test_a_cast_reaches_them() -> None:
    model = _model().bfloat16()
    assert {t.dtype for n, t in model.named_buffers() if "tinylora" in n} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_one_of_a_group_too_many_is_named(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    more = veneer.TinyLoraConfig.from_pretrained(tmp_path)
    more.weight_tying = 1.0  # type: ignore[attr-defined]
    more.save_pretrained(tmp_path)
    with pytest.raises(BindError, match=r"tinylora_v\.1: in the checkpoint, and this model and config have no such"):
        veneer.PeftModel.from_pretrained(build("llama"), tmp_path)


def test_buffers_that_layers_share_stay_one_through_moves_and_loads() -> None:
    config = veneer.VeraConfig(target_modules=["q_proj", "o_proj"], init_weights=False)
    model: Any = veneer.get_peft_model(build("llama"), config, seed=1).eval()
    layers, entry = list(model.adapters.layers.values()), model.adapters.by_name["default"]
    expected = logits(model, inputs("llama"))
    model.double().float()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    buffers = {id(buffer) for name, buffer in model.named_buffers() if "vera_A" in name}
    assert buffers == {id(layer.bound["default"][0].shared["vera_A"]) for layer in layers}
    assert buffers == {id(entry.layers.shared["vera_A"])}
    assert all(type(buffer) is Watched for name, buffer in model.named_buffers() if "vera_" in name)
    assert torch.equal(logits(model, inputs("llama")), expected)
    with torch.no_grad():
        entry.layers.shared["vera_A"].mul_(2)
    assert not torch.equal(logits(model, inputs("llama")), expected)


@pytest.mark.oracle
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning")
@pytest.mark.parametrize("kind", ["VeraConfig", "FrodConfig", "UniLoraConfig", "SupertuningConfig"])
def test_state_dicts_hold_what_those_of_peft_hold(kind: str, saved: bool) -> None:
    option = {"UniLoraConfig": "save_indices", "SupertuningConfig": "save_precomputed_indices"}.get(kind)
    options = {"target_modules": ["q_proj"], option or "save_projection": saved}
    leaves = []
    for library in (peft, veneer):
        model = library.get_peft_model(build("llama"), getattr(library, kind)(**options))
        own = [name.split(".default")[0] for name in model.state_dict() if "default" in name]
        leaves.append({part for name in own for part in name.split(".") if part.startswith(kind[:4].lower())})
    assert leaves[0] == leaves[1]
