"""Gives the warnings that users of peft expect of it, while Veneer is in its place (see :mod:`veneer.as_peft`)."""

from __future__ import annotations

import copy
from typing import Any

from veneer.configs.base import PeftConfig
from veneer.configs.names import PeftType
from veneer.configs.type_mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from veneer.packages import stands_in_for_peft
from veneer.printing import warn


def warn_of_name(name: str, config: PeftConfig) -> None:
    """Warn of an adapter's name that is a part of its method's prefix, by which peft finds tensors."""
    own_type = config.own_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(own_type, "") if isinstance(own_type, PeftType) else ""
    if str(name) in prefix and stands_in_for_peft():
        warn(
            f"Adapter name '{name}' should not be contained in the prefix '{prefix}'. Veneer loads it all the same; "
            "peft may begin with new weights."
        )


def with_name_of(config: PeftConfig, base: Any) -> PeftConfig:
    """Return a config that names its base as the base names itself; warn where it named another, as peft does."""
    named, name = config.base_model_name_or_path, getattr(base, "name_or_path", None) or None
    if named in (None, name) or not stands_in_for_peft():
        return config
    warn(
        f"The config's base_model_name_or_path was renamed from '{named}' to '{name}', for that is the base that the "
        "adapter is put on."
    )
    renamed = copy.copy(config)
    renamed.base_model_name_or_path = name
    return renamed
