"""Adapters that shift layers without a bias: the merged model's config gives it one, or the merge is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import veneer
from tests.models import BLOCKS, TEXT, build, gap, inputs, logits
from tests.random_adapters import config, edit_tensors, enlarge
from veneer.errors import MergeError

CLOSE = 1e-5
CONFIGS: dict[str, Any] = {
    "lora_bias": lambda: config(lora_bias=True),
    "attention alone": lambda: config(lora_bias=True, target_modules=["q_proj"]),
    "with DoRA": lambda: config(lora_bias=True, use_dora=True),
    "BEFT": lambda: veneer.BeftConfig(target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"),
}


@pytest.fixture(params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Make ``base/`` and ``adapter/``, and return the logits of the adapter."""
    base: Any = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(type(base).from_pretrained(tmp_path / "base"), CONFIGS[request.param]()).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model, inputs("llama"))


def reload(folder: Path) -> nn.Module:
    """Load a folder with transformers, which has to use every tensor of it."""
    model, told = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    return model.eval()


def test_in_memory_it_can_be_saved_and_loaded(made: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = made
    merged = veneer.load(folder / "adapter").merge_and_unload()
    assert gap(logits(merged, inputs("llama")), expected) < CLOSE
    merged.save_pretrained(tmp_path / "merged")
    assert gap(logits(reload(tmp_path / "merged"), inputs("llama")), expected) < CLOSE


def test_on_disk_it_is_the_same_bit_for_bit(made: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = made
    veneer.load(folder / "adapter", merge=True).base_model.model.save_pretrained(tmp_path / "memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.merge(folder / "adapter", out=tmp_path / "disk", reversible=True)
    assert gap(logits(reload(tmp_path / "disk"), inputs("llama")), expected) < CLOSE
    memory, disk = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert memory.keys() == disk.keys()
    for name, tensor in memory.items():
        assert gap(disk[name], tensor) < 1e-6 if tensor.any() else not disk[name].any()
    values = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("memory", "disk")]
    assert values[0]["attention_bias"] is values[1]["attention_bias"] is True
    assert values[0]["mlp_bias"] == values[1]["mlp_bias"]
    assert veneer.verify(tmp_path / "disk", adapter=folder / "adapter", base=folder / "base").passed
    veneer.unmerge(tmp_path / "disk", out=tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / "base" / name).read_bytes()


def test_what_no_setting_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2}
    base = tf.MistralForCausalLM(tf.MistralConfig(**TEXT, **BLOCKS, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    base = tf.MistralForCausalLM.from_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(base, config(lora_bias=True)).eval()
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, inputs("llama"))
    with pytest.raises(MergeError, match=r"q_proj a bias .* no setting of MistralConfig adds one") as caught:
        veneer.merge(tmp_path / "adapter", out=tmp_path / "out")
    assert "lora_bias=False" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    with pytest.raises(MergeError, match="no setting of MistralConfig"):
        model.merge_and_unload()
    assert torch.equal(logits(model, inputs("llama")), expected)
    model.merge_adapter()
    assert gap(logits(model, inputs("llama")), expected) < CLOSE
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs("llama")), expected)


def test_a_bias_of_zeros_needs_no_place(tmp_path: Path) -> None:
    base: Any = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(type(base).from_pretrained(tmp_path / "base"), config(lora_bias=True))
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda all: {k: t * 0 if k.endswith("B.bias") else t for k, t in all.items()})
    veneer.merge(tmp_path / "adapter", out=tmp_path / "disk")
    veneer.load(tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "memory")
    for folder in ("disk", "memory"):
        assert not [key for key in load_file(tmp_path / folder / "model.safetensors") if key.endswith("bias")]
        assert json.loads((tmp_path / folder / "config.json").read_text())["attention_bias"] is False
