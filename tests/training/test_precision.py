"""What a model is before it is trained: its dtypes, its gradients, and activations that are computed twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted
from veneer.errors import BaseModelError, UnknownKeywordError, UsageError


def kinds(model: nn.Module) -> dict[str, tuple[torch.dtype, bool]]:
    return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def half(flag: str | None) -> Any:
    model: Any = build("llama").to(torch.bfloat16).requires_grad_(True)
    if flag:
        setattr(model, flag, True)
    return model


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("flag", [None, "is_loaded_in_4bit", "is_loaded_in_8bit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}],
    ids=str,
)
def test_a_base_is_prepared_as_by_peft(flag: str | None, options: dict[str, Any]) -> None:
    ours, theirs = half(flag), half(flag)
    assert veneer.prepare_model_for_kbit_training(ours, **options) is ours
    peft.prepare_model_for_kbit_training(theirs, **options)
    assert kinds(ours) == kinds(theirs)
    checkpointed = [
        Counter(getattr(module, "gradient_checkpointing", None) for module in model.modules())
        for model in (ours, theirs)
    ]
    assert checkpointed[0] == checkpointed[1]
    embeddings = [model.get_input_embeddings() for model in (ours, theirs)]
    assert len(embeddings[0]._forward_hooks) == len(embeddings[1]._forward_hooks)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_frozen_parameters_are_cast_as_by_peft(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ours = veneer.get_peft_model(build("llama"), veneer.LoraConfig(**options))
    theirs: Any = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    veneer.cast_mixed_precision_params(ours, dtype)
    peft.cast_mixed_precision_params(theirs, dtype)
    assert Counter(kinds(ours).values()) == Counter(kinds(theirs).values())


def test_a_cast_model_computes_with_its_new_weights() -> None:
    model = adapted()
    batch = inputs("llama")
    before = logits(model, batch)
    veneer.cast_mixed_precision_params(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        after = logits(model, batch)
    assert 0 < gap(after.float(), before) < 0.1


def test_mistakes() -> None:
    with pytest.raises(BaseModelError, match="has adapters"):
        veneer.prepare_model_for_kbit_training(adapted())
    with pytest.raises(UnknownKeywordError, match="Did you mean use_gradient_checkpointing"):
        veneer.prepare_model_for_kbit_training(build("llama"), gradient_checkpointing=True)
    plain: Any = nn.Sequential(nn.Linear(2, 2))
    plain.is_loaded_in_4bit = True
    with pytest.raises(BaseModelError, match="use_gradient_checkpointing=False"):
        veneer.prepare_model_for_kbit_training(plain)
    with pytest.raises(UsageError, match="int8"):
        veneer.cast_mixed_precision_params(adapted(), torch.int8)
