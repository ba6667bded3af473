"""Adapters that peft trained with ``ensure_weight_tying`` on a base whose output layer is the embedding's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, WEIGHTS, scramble
from tests.test_tied import tied

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
BATCH = inputs("llama")
TOKEN = int(BATCH["input_ids"][0, 0])
BOTH = {"embed_tokens": [TOKEN, 7], "lm_head": [TOKEN, 7]}
CASES: dict[str, dict[str, Any]] = {
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "output saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "output adapted": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"trainable_token_indices": [TOKEN, 7]},
    "tokens of both": {"trainable_token_indices": BOTH},
}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_merges_and_saves_as_it_was_trained(case: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "r": 4, "task_type": "CAUSAL_LM", **CASES[case]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = scramble(peft.get_peft_model(tied(), peft.LoraConfig(ensure_weight_tying=True, **options)))
        other.save_pretrained(tmp_path / "peft")
    expected = logits(other, BATCH)
    assert gap(expected, logits(tied(), BATCH)) > VISIBLE
    here = veneer.PeftModel.from_pretrained(tied(), tmp_path / "peft")
    assert gap(logits(here, BATCH), expected) < CLOSE
    here.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "again"))
    assert all(torch.equal(first[key], tensor) for key, tensor in second.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(tied(), tmp_path / "again").eval()
    assert gap(logits(back, BATCH), expected) < CLOSE
    merged = here.merge_and_unload()
    assert gap(logits(merged, BATCH), expected) < CLOSE
    merged.save_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert gap(logits(model, BATCH), expected) < CLOSE
    said = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert said is (model.lm_head.weight is model.model.embed_tokens.weight)
    assert said or "adapted" in case


@pytest.mark.parametrize("case", CASES)
def test_training_so_is_refused_where_it_would_part_them(case: str) -> None:
    options = {"target_modules": ["q_proj"], **CASES[case]}
    config = veneer.LoraConfig(ensure_weight_tying=True, **options)
    if "tokens" in case:
        assert veneer.get_peft_model(tied(), config).adapters.layers
    else:
        with pytest.raises(veneer.UnsupportedError, match="ensure_weight_tying"):
            veneer.get_peft_model(tied(), config)
    assert veneer.get_peft_model(build("llama"), veneer.LoraConfig(ensure_weight_tying=True, **options)).adapters.layers


def test_going_on_with_it_is_refused_too(tmp_path: Path) -> None:
    config = veneer.LoraConfig(target_modules=["embed_tokens"])
    model = veneer.get_peft_model(tied(), config)
    model.peft_config["default"].ensure_weight_tying = True  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path)
    with pytest.raises(veneer.UnsupportedError, match="loads without is_trainable"):
        veneer.PeftModel.from_pretrained(tied(), tmp_path, is_trainable=True)
