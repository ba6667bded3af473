"""Prefixes and cartridges that begin with what a text leaves in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.models import build, inputs

CONFIGS = {
    "cartridge": veneer.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, task_type="CAUSAL_LM"),
    "prefix": veneer.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def begun(kind: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model whose prefix is the cache of the first four tokens of a text, and the text."""
    model = veneer.get_peft_model(build("llama"), CONFIGS[kind]).eval()
    ids = inputs("llama")["input_ids"][:1]
    with model.disable_adapter(), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    values = veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(veneer.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4), values)
    return model, ids, values


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rest_of_the_text_is_answered_as_after_its_beginning(kind: str) -> None:
    model, ids, _ = begun(kind)
    with torch.no_grad():
        rest = model(input_ids=ids[:, 4:]).logits
        with model.disable_adapter():
            whole = model(input_ids=ids).logits
    assert torch.allclose(rest, whole[:, 4:], atol=1e-5)


def test_two_cartridges_are_composed(tmp_path: Path) -> None:
    model, _, values = begun("cartridge")
    model.save_pretrained(tmp_path / "a")
    veneer.compose_cartridge_adapters([tmp_path / "a", tmp_path / "a"], output_path=tmp_path / "both")
    tensors = veneer.load_peft_weights(tmp_path / "both")
    assert torch.equal(tensors["prompt_embeddings"], torch.cat([values, values]))
    assert veneer.PeftConfig.from_pretrained(tmp_path / "both").num_virtual_tokens == 8
    veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "both")


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model, ids, _ = begun("prefix")
    with model.disable_adapter(), torch.no_grad():
        cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
    with pytest.raises(veneer.VeneerError, match="holds 1 rows of 2 tokens"):
        veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    with pytest.raises(veneer.VeneerError, match="has 4 virtual tokens, not 3"):
        veneer.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=3)
    lora = veneer.get_peft_model(build("llama"), veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(veneer.AdapterError, match="keeps no keys and values"):
        veneer.initialize_kv_prefix_from_past_key_values(lora, past_key_values=cache)
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(veneer.VeneerError, match="is no cartridge"):
        veneer.compose_cartridge_adapters([tmp_path / "lora"], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()
