"""How transformers reads what its older versions wrote: the one place that knows how it keeps those rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The rules are for parameters; a module is asked for by one that it may have.
_PARAMETER = ".weight"


def conversions_of(model: Any) -> tuple[list[Any], list[Any]]:
    """The rules by which tensors are loaded into ``model``: those that rename, and those that make one of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def renames_of(model: Any) -> Callable[[str], str]:
    """What gives a module's name in ``model`` for its name in an older version; any other name as it is."""
    from transformers.core_model_loading import apply_renamings

    renamings, _ = conversions_of(model)

    def renamed(name: str) -> str:
        found: str = apply_renamings(name + _PARAMETER, renamings)
        return found.removesuffix(_PARAMETER) if found.endswith(_PARAMETER) else name

    return renamed
