"""Configs have the fields of peft's, with the same defaults, and come back from a file as they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest

import veneer
from veneer.configs.base import PeftConfig, PromptConfig
from veneer.configs.type_mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from veneer.errors import ConfigError, ConfigTypeError, UnknownKeyError

PEER: dict[str, type] = {str(kind.value): cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
NEEDED: dict[str, dict[str, Any]] = {"ADALORA": {"total_step": 10}, "CPT": {"task_type": "CAUSAL_LM"}}
NESTED = {
    "eva_config": veneer.EvaConfig(rho=7.5),
    "corda_config": veneer.CordaConfig(corda_method="kpm"),
    "lora_ga_config": veneer.LoraGAConfig(direction="ArBr"),
    "arrow_config": veneer.ArrowConfig(top_k=4),
    "kasa_config": veneer.KasaConfig(beta=0.5),
    "monteclora_config": veneer.MontecloraConfig(num_samples=3),
    "velora_config": veneer.VeloraConfig(num_groups=32),
    "use_bdlora": veneer.BdLoraConfig(nblocks=4),
}


STARTS = ("eva_config", "corda_config", "lora_ga_config")


def defaults(kind: type) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        values[field.name] = dataclasses.asdict(default) if field.name == "runtime_config" else default
    return values


def made(peft_type: str, **options: Any) -> PeftConfig:
    return PeftConfig.from_peft_type(peft_type, **NEEDED.get(peft_type, {}), **options)


@pytest.mark.parametrize("peft_type", PEER)
def test_every_field_of_a_config_has_its_name_and_default(peft_type: str) -> None:
    own, peer = defaults(PEFT_TYPE_TO_CONFIG_MAPPING[veneer.PeftType(peft_type)]), defaults(PEER[peft_type])
    assert {name: own.get(name, "missing") for name in peer} == {**peer, "peft_type": None}


@pytest.mark.parametrize("peft_type", PEER)
def test_a_config_comes_back_from_a_file(peft_type: str, tmp_path: Path) -> None:
    config = made(peft_type)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert PeftConfig.from_json_file(tmp_path / "adapter_config.json") == config.to_dict()
    assert config.inference_mode is False
    assert config.is_prompt_learning == isinstance(config, PromptConfig)
    assert config.is_adaption_prompt == (peft_type == "ADAPTION_PROMPT")


@pytest.mark.parametrize("peft_type", [kind for kind in PEER if kind != "XLORA"])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "feedforward_modules"])
def test_lists_of_names_become_what_they_do_in_peft(peft_type: str, option: str) -> None:
    if option not in {field.name for field in dataclasses.fields(PEER[peft_type])} or peft_type == "ADAPTION_PROMPT":
        return
    names = {"target_modules": ["b", "a"], option: ["b", "a"]} if option == "feedforward_modules" else {option: ["b"]}
    own = made(peft_type, **names)
    assert getattr(own, option) == getattr(PEER[peft_type](**NEEDED.get(peft_type, {}), **names), option)
    assert json.loads(own.to_json())[option] == sorted(names[option])


@pytest.mark.parametrize("option", NESTED)
def test_nested_options_come_back_as_their_class(option: str, tmp_path: Path) -> None:
    start: dict[str, Any] = {"init_lora_weights": option.removesuffix("_config")} if option in STARTS else {}
    veneer.LoraConfig(**{option: NESTED[option]}, **start).save_pretrained(tmp_path)
    config = veneer.PeftConfig.from_pretrained(tmp_path)
    assert getattr(config, option) == NESTED[option]
    by_dict = veneer.LoraConfig(**{option: dataclasses.asdict(NESTED[option])}, **start)  # type: ignore[call-overload]
    assert getattr(by_dict, option) == NESTED[option]
    with pytest.raises(ConfigError, match=f"must be a `{type(NESTED[option]).__name__}`, a dict, or None"):
        veneer.LoraConfig(**{option: 123})


@pytest.mark.parametrize("option", STARTS)
def test_options_of_a_start_that_is_not_chosen_are_warned_of(option: str) -> None:
    with pytest.warns(UserWarning, match=f"`{option}` specified but will be ignored"):
        veneer.LoraConfig(**{option: NESTED[option]})


def test_options_of_the_run_are_never_in_a_file(tmp_path: Path) -> None:
    config = veneer.LoraConfig()
    config.runtime_config.ephemeral_gpu_offload = True
    config.save_pretrained(tmp_path)
    assert "runtime_config" not in json.loads((tmp_path / "adapter_config.json").read_text())
    values = {**config.to_dict(), "runtime_config": {"ephemeral_gpu_offload": True}}
    again = PeftConfig.from_dict(values)
    assert isinstance(again, veneer.LoraConfig)
    assert not again.runtime_config.ephemeral_gpu_offload


def test_a_model_says_that_its_saved_config_is_for_inference(tmp_path: Path) -> None:
    config = veneer.LoraConfig()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is False


@pytest.mark.parametrize("peft_type", PEER)
def test_a_task_that_does_not_exist_is_refused(peft_type: str) -> None:
    with pytest.raises(ConfigError, match=r"Invalid task type: 'causal_lm'.*Did you mean 'CAUSAL_LM'"):
        PeftConfig.from_peft_type(peft_type, **{**NEEDED.get(peft_type, {}), "task_type": "causal_lm"})


def test_a_file_without_a_type_or_with_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"foo": "bar"}')
    with pytest.raises(ConfigTypeError, match=r"LoraConfig config .* is missing required keys: \{'peft_type'\}"):
        veneer.LoraConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps({**veneer.LoraConfig().to_dict(), "foo": "baz", "spam": 123}))
    with pytest.warns(UserWarning, match=r"^Unexpected keyword arguments \['foo', 'spam'\] for class LoraConfig"):
        config = veneer.LoraConfig.from_pretrained(tmp_path)
    assert config.to_dict() == veneer.LoraConfig().to_dict()
    assert json.loads(config.to_json())["spam"] == 123
    file.write_text(json.dumps({**veneer.LoraConfig().to_dict(), "use_foo": True}))
    with pytest.raises(UnknownKeyError, match="use_foo=True"):
        veneer.LoraConfig.from_pretrained(tmp_path)


def test_options_are_checked_before_a_config_is_made() -> None:
    assert veneer.LoraConfig.check_kwargs(r=4) == {"r": 4}
    with pytest.raises(ConfigError, match="is no rank"):
        PeftConfig.check_kwargs(peft_type="LORA", r=0)
    with pytest.raises(ConfigTypeError, match="missing required keys"):
        PeftConfig.check_kwargs(r=4)


def test_equal_targets_have_one_text() -> None:
    names = [f"layer{i}" for i in range(200)]
    texts = {repr(veneer.LoraConfig(target_modules=order)) for order in (names, names[::-1], set(names))}
    assert len(texts) == 1
