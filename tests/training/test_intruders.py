"""LoRA without its intruders, against peft's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as peers

import veneer
from tests.models import build, inputs, logits
from veneer.training.intruders import reduce_intruder_dimension


def both(targets: list[str]) -> list[Any]:
    torch.manual_seed(0)
    models = []
    for library in (peft, veneer):
        config = library.LoraConfig(target_modules=targets, r=4, lora_alpha=64, init_lora_weights=False)
        models.append(library.get_peft_model(build("llama"), config).eval())
    state = models[0].state_dict()
    models[1].load_state_dict({k: v * 5 if "lora" in k else v for k, v in state.items()})
    models[0].load_state_dict(models[1].state_dict())
    return models


@pytest.mark.oracle
@pytest.mark.parametrize("threshold", [0.6, 999])
def test_it_answers_as_peft_s(threshold: float) -> None:
    theirs, ours = both(["q_proj", "down_proj"])
    before = logits(ours, inputs("llama"))
    lines: list[str] = []
    peers(theirs, threshold_epsilon=threshold, logging_sink=None)
    reduce_intruder_dimension(ours, threshold_epsilon=threshold, logging_sink=lines.append)
    assert ours.active_adapters == theirs.active_adapters == ["intruder_reduced"]
    assert torch.allclose(logits(ours, inputs("llama")), logits(theirs, inputs("llama")), atol=1e-3)
    assert lines
    ours.set_adapter("default")
    assert torch.equal(logits(ours, inputs("llama")), before)


def test_an_embedding_loses_its_intruders_too() -> None:
    """peft's new adapter has factors of other shapes there, and cannot run."""
    model = both(["embed_tokens"])[1]
    layer = model.get_base_model().model.embed_tokens
    base, change = layer.base_layer.weight.detach(), layer.get_delta_weight("default")
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=999, mitigation_lambda=0.25, logging_sink=None)
    left, values, right = torch.linalg.svd(base + change, full_matrices=False)
    expected = change - 0.75 * (left[:, :3] * values[:3]) @ right[:3]
    # Of the change's rank, which is less than that of what is expected.
    u, s, v = torch.linalg.svd(expected, full_matrices=False)
    assert torch.allclose(layer.get_delta_weight("intruder_reduced"), (u[:, :4] * s[:4]) @ v[:4], rtol=1e-3, atol=1e-2)


def test_it_keeps_the_dtype_and_refuses_other_methods() -> None:
    config = veneer.LoraConfig(target_modules=["q_proj"])
    model = veneer.get_peft_model(build("llama").bfloat16(), config, autocast_adapter_dtype=False)
    reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["intruder_reduced"].weight.dtype == torch.bfloat16
    model = veneer.get_peft_model(build("llama"), veneer.MissConfig(target_modules=["q_proj"], r=8))
    with pytest.raises(veneer.UnsupportedError, match="is no plain LoRA"):
        reduce_intruder_dimension(model)
