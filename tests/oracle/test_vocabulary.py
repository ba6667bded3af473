"""Adapters trained on a base whose vocabulary was resized, loaded on the base as it is on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import veneer
from tests.models import LLAMA, build, gap, logits
from tests.oracle.peer import base_model, scramble
from tests.random_adapters import edit_tensors

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
MORE = 103
IDS = torch.tensor([[5, 99, 7, 102, 8]])


def bases(folder: Path, tied: bool) -> Path:
    model: Any = build("llama")
    if tied:
        config = tf.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True})
        weights = model.state_dict()
        model = tf.LlamaForCausalLM(config)
        model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    model.save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, seed: int = 1, **options: Any) -> Tensor:
    """Let peft train on the resized base and save; give the logits."""
    model: Any = base_model("llama", base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.weight.data[99:] = torch.randn(MORE - 99, 32)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that embeddings are saved, that they are tied
        made = scramble(peft.get_peft_model(model, config))
        made.save_pretrained(folder)
    return logits(made, {"input_ids": IDS})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}],
    ids=["saved by themselves", "adapted", "saved whole"],
)
def test_with_its_rows_it_computes_the_same(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = bases(tmp_path / "base", tied)
    expected = trained(base, tmp_path / "adapter", **options)
    model = veneer.load(tmp_path / "adapter", base=base)
    assert gap(logits(model, {"input_ids": IDS}), expected) < CLOSE
    assert any("resized from 99 to 103" in warning for warning in model.load_report.warnings)
    merged = model.merge_and_unload()
    assert gap(logits(merged, {"input_ids": IDS}), expected) < CLOSE
    merged.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.vocab_size == MORE
    assert gap(logits(again, {"input_ids": IDS}), expected) < CLOSE


def test_new_tokens_that_were_trained_are_rows_too(tmp_path: Path) -> None:
    base = bases(tmp_path / "base", tied=True)
    tokens = [7, *range(99, MORE)]
    expected = trained(base, tmp_path / "adapter", trainable_token_indices=tokens)

    def without_embeddings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t for key, t in tensors.items() if "lora" in key or "token_adapter" in key}

    edit_tensors(tmp_path / "adapter", without_embeddings)
    model = veneer.load(tmp_path / "adapter", base=base)
    assert gap(logits(model, {"input_ids": IDS}), expected) < CLOSE


@pytest.mark.parametrize("dropped", ["lm_head.weight", "embed_tokens.weight"])
def test_without_its_rows_nothing_large_is_loaded(
    dropped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases(tmp_path / "base", tied=False)
    trained(base, tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda tensors: {k: t for k, t in tensors.items() if not k.endswith(dropped)})
    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", _never)
    with pytest.raises(veneer.BaseModelError, match=r"vocabulary of 103 tokens.*has 99") as caught:
        veneer.load(tmp_path / "adapter", base=base)
    assert "resize_token_embeddings(103)" in str(caught.value.hint)


def _never(*args: Any, **kwargs: Any) -> nn.Module:
    raise AssertionError("the base was loaded")


def test_on_a_base_in_memory_the_error_says_what_to_do(tmp_path: Path) -> None:
    base = bases(tmp_path / "base", tied=False)
    expected = trained(base, tmp_path / "adapter")
    model: Any = base_model("llama", base)
    with pytest.raises(veneer.BindError, match=r"resize_token_embeddings\(103\)"):
        veneer.PeftModel.from_pretrained(model, tmp_path / "adapter")
    model.resize_token_embeddings(MORE, mean_resizing=False)
    loaded = veneer.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert gap(logits(loaded, {"input_ids": IDS}), expected) < CLOSE
