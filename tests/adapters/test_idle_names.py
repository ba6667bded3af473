"""Names in the config of a new adapter that mean nothing in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.models import build, logits, tokens
from tests.random_adapters import adapted, config, enlarge
from veneer.errors import TargetError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "target_modules names 'v_prj', and no module.*'v_proj'"),
        ({"exclude_modules": ["lm_heed"]}, "exclude_modules names 'lm_heed'.*'lm_head'"),
        ({"rank_pattern": {"q_prj": 3}}, "rank_pattern names 'q_prj'.*'q_proj'"),
        ({"alpha_pattern": {"nothing": 3}}, r"alpha_pattern names 'nothing', and no module of the model\."),
        ({"exclude_modules": r".*\.lm_heed"}, "exclude_modules names.*lm_heed'.*'lm_head'"),
        ({"rank_pattern": {"k_proj": 3}}, "rank_pattern names 'k_proj', and no layer that the adapter is on"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform names block 7, and no target is there"),
        ({"target_parameters": ["q_prj.weight"]}, "target_parameters names 'q_prj.weight', and no parameter"),
        ({"target_parameters": ["k_proj.weight"], "target_modules": ["q_prj"]}, "target_modules names 'q_prj'"),
        ({"target_parameters": ["k_proj.weight"], "target_modules": r".*\.q_prj"}, "target_modules names"),
    ],
)
def test_a_name_that_means_nothing_is_told(options: dict[str, Any], words: str) -> None:
    with pytest.warns(UserWarning, match=words) as caught:
        veneer.get_peft_model(build("llama"), config(**options))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_patterns_that_mean_something_are_fine() -> None:
    adapted(rank_pattern={r"layers\.0\..*": 3, "self_attn.q_proj": 2}, exclude_modules=["1.self_attn.q_proj"])


@pytest.mark.parametrize("kind", [veneer.LoraConfig, veneer.VeraConfig, veneer.IA3Config, veneer.OFTConfig])
def test_it_is_told_whatever_the_method(kind: Any) -> None:
    options = {"feedforward_modules": []} if kind is veneer.IA3Config else {}
    with pytest.warns(UserWarning, match="target_modules names 'v_prj'") as caught:
        veneer.get_peft_model(build("llama"), kind(target_modules=["q_proj", "v_prj"], **options))
    assert len(caught) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_prj"]},
        {"target_modules": ["q_prj"], "target_parameters": ["q_prj.weight"]},
        {"target_modules": [], "target_parameters": ["q_prj.weight"]},
        {"target_modules": None, "target_parameters": ["q_prj.weight"]},
    ],
)
def test_an_adapter_that_would_be_nowhere_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match=r"not found|matches no"):
        veneer.get_peft_model(build("llama"), veneer.LoraConfig(**options))


def test_names_that_mean_nothing_do_not_hinder_loading(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="target_modules names 'q_prj'"):
        model = adapted(target_modules=["q_prj"], target_parameters=["k_proj.weight"])
    enlarge(model, "default")
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
