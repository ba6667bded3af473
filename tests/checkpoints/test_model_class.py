"""Which class a base is built as, where an adapter's task is not what the base is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import veneer
from tests.checkpoints.test_renamed_layers import llava, qwen
from tests.models import LLAMA, TEXT, build, inputs, logits
from tests.random_adapters import CONFIG, enlarge, saved_base


def mllama() -> nn.Module:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4}
    vision |= {"intermediate_size": 40, "image_size": 16, "patch_size": 4, "vision_output_dim": 64}
    text = {**LLAMA, "cross_attention_layers": [1]}
    return tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(vision_config={**vision, "intermediate_layers_indices": [0]}, text_config=text)
    )


def whisper() -> nn.Module:
    return build("whisper")


def saved(make: Callable[[], Any], task: str | None, folder: Path, **options: Any) -> tuple[Path, Path]:
    """A base, and an adapter for it whose config says ``task``."""
    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    config = veneer.LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **options})
    model = veneer.get_peft_model(make(), config)
    enlarge(model, "default")
    model.save_pretrained(folder / "adapter")
    values = json.loads((folder / "adapter" / CONFIG).read_text())
    (folder / "adapter" / CONFIG).write_text(json.dumps({**values, "task_type": task}))
    return folder / "adapter", folder / "base"


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (qwen, "CAUSAL_LM"),  # has no such class
        (llava, "CAUSAL_LM"),
        (mllama, "CAUSAL_LM"),  # has one for text alone, whose layers have other names
        (whisper, "SEQ_2_SEQ_LM"),
        (whisper, "CAUSAL_LM"),  # has one that is a decoder alone
    ],
)
def test_the_bases_own_class_is_taken_where_the_tasks_does_not_have_the_layers(
    make: Callable[[], Any], task: str, tmp_path: Path
) -> None:
    adapter, base = saved(make, task, tmp_path)
    kind = type(make()).__name__
    model = veneer.load(adapter, base=base)
    assert type(model.get_base_model()).__name__ == kind
    report = model.load_report
    assert report.adapters[0].tensors_bound == report.adapters[0].tensors_total
    assert any(f"task_type={task}" in warning and kind in warning for warning in report.warnings)
    merged = veneer.merge(adapter, base, out=tmp_path / "merged")
    assert any(f"task_type={task}" in warning and kind in warning for warning in merged.warnings)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [kind]


def test_the_tasks_class_is_taken_where_it_has_the_layers(tmp_path: Path) -> None:
    def decoder() -> Any:
        config = tf.WhisperConfig.from_pretrained(tmp_path / "base")
        return tf.WhisperForCausalLM(config)

    whisper().save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(decoder(), veneer.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = veneer.load(tmp_path / "adapter", base=tmp_path / "base")
    assert type(loaded.get_base_model()).__name__ == "WhisperForCausalLM"
    assert not any("task_type" in warning for warning in loaded.load_report.warnings)


def test_an_encoder_adapter_of_a_headed_model_keeps_it(tmp_path: Path) -> None:
    adapter, base = saved(lambda: build("llama"), "FEATURE_EXTRACTION", tmp_path)
    model = veneer.load(adapter, base=base)
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert logits(model, inputs("llama")).shape[-1] == TEXT["vocab_size"]


def test_a_task_that_is_asked_for_is_not_exchanged(tmp_path: Path) -> None:
    adapter, base = saved(qwen, None, tmp_path)
    with pytest.raises(veneer.BaseModelError, match=r"no AutoModelForCausalLM.*qwen2_5_vl.*IMAGE_TEXT_TO_TEXT"):
        veneer.load(adapter, base=base, task="CAUSAL_LM")
    with pytest.raises(veneer.BaseModelError, match="no AutoModelForCausalLM"):
        veneer.merge(adapter, base, out=tmp_path / "merged", task="CAUSAL_LM")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_told_by_its_own_layers(tmp_path: Path) -> None:
    """No class of the base has them: the error is that they do not fit."""
    adapter, _ = saved(whisper, "CAUSAL_LM", tmp_path)
    base = saved_base(tmp_path / "other", "gpt2")
    with pytest.raises(veneer.BindError, match="the model has no"):
        veneer.load(adapter, base=base)
