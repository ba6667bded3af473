"""Values that an adapter's config cannot have, each refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.models import build
from veneer.configs.base import PeftConfig
from veneer.errors import ConfigError, TargetError

WRONG = {
    "lora_alpha": [float("nan"), float("inf"), 10**400, "8", True, [8]],
    "alpha_pattern": [{"q_proj": float("nan")}, {"q_proj": 10**400}, {"q_proj": "x"}, ["q_proj"]],
    "r": [8.0, "8", None, True, 0, -1],
    "rank_pattern": [{"q_proj": 2.5}, {"q_proj": 0}, ["q_proj"]],
    "target_modules": [[3], 7, {"q_proj": 1}],
    "exclude_modules": [7, [None]],
    "modules_to_save": ["lm_head", [3]],
    "layers_to_transform": ["x", [True], 1.5],
    "base_model_name_or_path": [3, ["x"]],
    "revision": [3],
    "fan_in_fan_out": ["yes", 1],
    "use_rslora": ["no"],
    "lora_dropout": [1.0, -0.1, "0", float("nan")],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named_with_its_file(key: str, value: Any) -> None:
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], key: value}
    with pytest.raises(ConfigError, match=rf"^some/adapter_config\.json: {key}") as caught:
        PeftConfig.from_dict(values, where="some/adapter_config.json")
    assert caught.value.hint
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("targets", [{"v_proj", "q_proj"}, ("q_proj", "v_proj"), ["q_proj", "v_proj"]])
def test_python_may_give_any_collection_of_names(targets: Any) -> None:
    assert sorted(veneer.LoraConfig(target_modules=targets).target_modules or ()) == ["q_proj", "v_proj"]


def test_infinity_in_a_file_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1}).replace(": 1", ": 1e400")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match="lora_alpha=inf"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_module_to_save_must_be_there() -> None:
    config = veneer.LoraConfig(target_modules=["q_proj"], modules_to_save=["nothere"])
    with pytest.raises(TargetError, match=r"'nothere'.*no such module.*lm_head"):
        veneer.get_peft_model(build("llama"), config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: veneer.ArrowConfig(top_k="3"), "ArrowConfig: top_k='3' is not of the type int. The default is 3."),  # type: ignore[arg-type]
        (lambda: veneer.LoftQConfig(loftq_bits=5), "Unsupported `loftq_bits` 5. Supported values are 4 and 8"),  # type: ignore[arg-type]
        (lambda: veneer.KasaConfig(beta=float("inf")), "beta=inf is no number that float32 holds"),
        (lambda: veneer.RoadConfig(variant="road_3"), "variant='road_3' is unknown. Known: 'road_1', 'road_2'"),
    ],
)
def test_options_are_checked_too(make: Any, words: str) -> None:
    with pytest.raises(veneer.ConfigError, match=words):
        make()


def test_vectors_that_the_bank_does_not_have_are_refused() -> None:
    with pytest.raises(veneer.ConfigError, match="topk=2 vectors cannot be chosen of num_vectors=1"):
        veneer.VBLoRAConfig(num_vectors=1, topk=2)


def test_feedforward_modules_are_among_the_targets() -> None:
    with pytest.raises(veneer.ConfigError, match=r"should be a subset of `target_modules`: \['q'\] are not"):
        veneer.IA3Config(target_modules=["k", "v"], feedforward_modules=["q"])
    veneer.IA3Config(target_modules=["k", "v"], feedforward_modules=["v"])
    veneer.IA3Config(target_modules=".*(q|v)", feedforward_modules=["v"])
