"""layer_replication: blocks that a model has several times while an adapter is on it, as peft does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, scramble
from tests.random_adapters import bits, same_bits

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
RANGES = [[0, 2], [0, 1], [1, 2]]
OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("replicated")
    config = peft.LoraConfig(**OPTIONS, layer_replication=RANGES)
    scramble(peft.get_peft_model(build("llama"), config)).save_pretrained(place / "more")
    scramble(peft.get_peft_model(build("llama"), peft.LoraConfig(**OPTIONS)), 5).save_pretrained(place / "plain")
    return place


def test_it_computes_what_peft_computes_and_is_taken_off_without_a_trace(folder: Path) -> None:
    base: Any = build("llama")
    before, count = bits(base), base.config.num_hidden_layers
    alone = logits(base, inputs("llama"))
    model = veneer.PeftModel.from_pretrained(base, folder / "more")
    expected = logits(peft.PeftModel.from_pretrained(build("llama"), folder / "more").eval(), inputs("llama"))
    assert gap(expected, alone) > VISIBLE
    assert gap(logits(model, inputs("llama")), expected) < CLOSE
    assert model.config.num_hidden_layers == 4
    blocks = model.get_base_model().model.layers
    assert blocks[0].self_attn.k_proj.weight is blocks[2].self_attn.k_proj.weight
    bare = model.unload()
    assert same_bits(bits(bare), before)
    assert bare.config.num_hidden_layers == count
    assert gap(logits(bare, inputs("llama")), alone) < 1e-7


def test_it_generates_with_a_cache(folder: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build("llama"), folder / "more")
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs("llama"), **how), model.generate(**inputs("llama"), **how, use_cache=False)
    )


def test_merged_and_saved_it_is_a_deeper_model(folder: Path, tmp_path: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build("llama"), folder / "more")
    expected = logits(model, inputs("llama"))
    model.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == 4
    assert gap(logits(again, inputs("llama")), expected) < CLOSE


def test_made_here_it_loads_in_peft(tmp_path: Path) -> None:
    config = veneer.LoraConfig(**OPTIONS, layer_replication=RANGES)
    model = scramble(veneer.get_peft_model(build("llama"), config, seed=1))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert gap(logits(theirs, inputs("llama")), logits(model, inputs("llama"))) < CLOSE


def test_one_model_cannot_have_blocks_of_two_kinds(folder: Path) -> None:
    model = veneer.PeftModel.from_pretrained(build("llama"), folder / "more")
    model.load_adapter(folder / "more", adapter_name="again")
    with pytest.raises(veneer.AdapterError, match="layer_replication=None"):
        model.load_adapter(folder / "plain", adapter_name="plain")
    assert list(model.peft_config) == ["default", "again"]


def test_a_range_that_is_none_leaves_the_model_as_it_was() -> None:
    base: nn.Module = build("llama")
    before = bits(base)
    for ranges in ([[0, 9]], [[1, 1]], [[1]]):
        with pytest.raises(veneer.ConfigError, match="layer_replication"):
            veneer.get_peft_model(base, veneer.LoraConfig(**OPTIONS, layer_replication=ranges))
    config = veneer.LoraConfig(r=4, target_modules=["nothing"], layer_replication=RANGES)
    with pytest.raises(veneer.TargetError):
        veneer.get_peft_model(base, config)
    assert same_bits(bits(base), before)
