"""Bases whose output layer shares its weight with the embedding: adapters on either side of the tie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import scramble

CLOSE = 1e-5


def tied() -> nn.Module:
    model: Any = build("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


# What is adapted -> whether embedding and output layer still agree afterwards.
SIDES: dict[str, tuple[dict[str, Any], bool]] = {
    "lora on the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "lora on the output": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "lora on both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "output saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "embedding saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [4, 40, 7]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
}


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], bool, Path, Callable[[], Any]]:
    """Options, whether the tie stays, the base's folder, and what makes the adapted model."""
    options, stays = SIDES[request.param]
    base = tmp_path / "base"
    tied().save_pretrained(base)
    config = veneer.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    made = scramble(veneer.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, seed=1))
    made.save_pretrained(tmp_path / "adapter")
    return options, stays, base, lambda: veneer.load(tmp_path / "adapter", base=base)


def test_what_is_merged_saved_and_read_again_is_what_was_unmerged(side: Any, tmp_path: Path) -> None:
    _, stays, base, load = side
    model = load()
    expected = logits(model, inputs("llama"))
    assert gap(expected, logits(AutoModelForCausalLM.from_pretrained(base), inputs("llama"))) > 0.02
    merged = model.merge_and_unload()
    assert gap(logits(merged, inputs("llama")), expected) < CLOSE
    merged.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert gap(logits(again, inputs("llama")), expected) < CLOSE
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is stays


def test_one_side_is_told(side: Any) -> None:
    options, stays, _, load = side
    both = "lm_head" in str(options) and "embed_tokens" in str(options)
    told = any("shares its weight" in warning for warning in load().load_report.warnings)
    assert told is (not stays and not both)


def test_merged_unmerged_and_taken_off_the_base_is_tied_again(side: Any) -> None:
    *_, base, load = side
    model = load()
    model.merge_adapter()
    model.unmerge_adapter()
    bare = model.unload()
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    assert bare.config.tie_word_embeddings is True
    assert torch.equal(
        logits(bare.requires_grad_(False), inputs("llama")),
        logits(AutoModelForCausalLM.from_pretrained(base).requires_grad_(False), inputs("llama")),
    )
