"""Maps each ``peft_type`` to its config's class, and makes a config of a dictionary, under peft's names."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from veneer.configs.base import PeftConfig, config_class
from veneer.configs.names import PeftType
from veneer.keywords import takes

PEFT_TYPE_TO_CONFIG_MAPPING = {kind: config_class(kind, "PEFT_TYPE_TO_CONFIG_MAPPING") for kind in PeftType}

# The beginning of the names of a method's tensors, where it is not the method's own.
_OTHER_PREFIXES = {
    **{PeftType.LORA: "lora_", PeftType.ADALORA: "lora_", PeftType.LOHA: "hada_"},
    **{PeftType.VERA: "vera_lambda_", PeftType.PVERA: "pvera_lambda_"},
}
PEFT_TYPE_TO_PREFIX_MAPPING = {kind: _OTHER_PREFIXES.get(kind, f"{kind.lower()}_") for kind in PeftType}


@takes()
def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Make the config that a dictionary describes, as ``adapter_config.json`` holds it.

    Args:
        config_dict: with ``peft_type``, and the method's options.

    Raises:
        ConfigError: ``peft_type`` is missing, or a value is not of its kind. UnknownMethodError: no method is named so.
        UnknownKeyError: a key is unknown and may change the maths.
    """
    # The enums of another library are strings that print otherwise.
    values = {key: value.value if isinstance(value, Enum) else value for key, value in config_dict.items()}
    return PeftConfig.from_dict(values, where="get_peft_config")
