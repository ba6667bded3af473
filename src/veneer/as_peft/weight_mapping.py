"""Tells transformers' own ``load_adapter`` where the tensors of a checkpoint belong in a model with an adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.core_model_loading import WeightRenaming

from veneer.configs.base import PeftConfig
from veneer.files.tensor_keys import PREFIX
from veneer.methods import method_of


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """Return the renamings from a checkpoint's keys to the names of an adapter's tensors on the model.

    Args:
        weight_conversions: transformers' own for the base's weights, whose renamings of modules adapters follow.
        adapter_name: the adapter.
        peft_config: its config.
    """
    renamings = [WeightRenaming(f"^{re.escape(PREFIX)}", "")]
    renamings += [conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)]
    if peft_config is None:
        return renamings
    for leaf in method_of(peft_config).leaves:
        head, _, tail = leaf.memory_name.partition(".")
        name = ".".join(filter(None, (head, adapter_name, tail)))
        renamings.append(WeightRenaming(rf"\.{re.escape(leaf.name)}$", f".{name}"))
    return renamings
