"""A base on which peft has put an adapter, itself or for transformers, is recognised, and usable once it is off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build, inputs, logits
from tests.random_adapters import config, saved
from veneer.errors import BaseModelError

pytestmark = pytest.mark.oracle

LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def by_peft(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def inside_of_peft(model: Any) -> Any:
    return by_peft(model).get_base_model()


def with_prompts(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def by_transformers(model: Any) -> Any:
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


def emptied_by_transformers(model: Any) -> Any:
    """Delete the only adapter, which leaves peft's layers."""
    model = by_transformers(model)
    model.delete_adapter("default")
    return model


@pytest.mark.parametrize("adapt", [by_peft, inside_of_peft, with_prompts, by_transformers, emptied_by_transformers])
def test_it_is_recognised(adapt: Callable[[Any], Any], tmp_path: Path) -> None:
    model = adapt(build("llama"))
    with pytest.raises(BaseModelError, match=r"carries an adapter of peft's already \(first at .*delete_adapter"):
        veneer.get_peft_model(model, config())
    with pytest.raises(BaseModelError, match="carries an adapter of peft's already"):
        veneer.PeftModel.from_pretrained(model, saved(tmp_path))


def test_it_is_a_base_again_when_the_adapter_is_off(tmp_path: Path) -> None:
    folder, batch = saved(tmp_path), inputs("llama")
    expected = logits(veneer.PeftModel.from_pretrained(build("llama"), folder), batch)
    unloaded = by_peft(build("llama")).unload()
    assert torch.equal(logits(veneer.PeftModel.from_pretrained(unloaded, folder), batch), expected)
