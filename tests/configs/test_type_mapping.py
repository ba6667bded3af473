"""Configs by their ``peft_type``."""

from __future__ import annotations

import peft
import pytest

import veneer
from veneer.errors import ConfigError, UnknownKeyError, UnknownMethodError


@pytest.mark.oracle
def test_every_method_of_peft_has_the_config_of_its_name() -> None:
    mapping = veneer.PEFT_TYPE_TO_CONFIG_MAPPING
    assert mapping.keys() == set(veneer.PeftType)
    for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert mapping[veneer.PeftType(kind.value)].__name__ == config.__name__
    assert mapping["LORA"] is veneer.LoraConfig  # type: ignore[index]


@pytest.mark.oracle
def test_a_dictionary_becomes_the_config_of_its_type() -> None:
    values = {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = veneer.get_peft_config(dict(values))
    assert isinstance(config, veneer.LoraConfig)
    theirs = peft.get_peft_config(values).to_dict()
    assert veneer.get_peft_config({**theirs, "peft_version": None}) == config
    assert values.items() <= config.to_dict().items()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"r": 3}, ConfigError, "no peft_type"),
        ({"peft_type": "LORE"}, UnknownMethodError, "LORA"),
        ({"peft_type": "LORA", "use_magic": True}, UnknownKeyError, "use_magic"),
        ({"peft_type": "LORA", "r": "many"}, ConfigError, "get_peft_config: r="),
    ],
)
def test_each_mistake_has_its_error(values: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        veneer.get_peft_config(values)
