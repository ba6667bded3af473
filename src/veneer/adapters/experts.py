"""Checks the adapters that another one mixes (its experts)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.configs.base import TargetedConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.patches.patch import Patch

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


def check_experts(config: TargetedConfig, adapters: Adapters) -> None:
    """Check that the adapters that ``config`` mixes are on the model, and take their layers where it names none.

    Raises:
        AdapterError: one is not there.
        UnsupportedError: one does more than add a product of two matrices.
    """
    layers = []
    for name in config.experts:
        if name not in adapters.by_name:
            raise AdapterError(
                f"The adapter mixes {list(config.experts)}, and {name!r} is not on this model.",
                hint="Load those first, under these names.",
            )
        for layer in adapters.by_name[name].layers:
            if not all(_is_plain(patch) for patch in layer.patches([name])):
                raise UnsupportedError(
                    f"{name!r} does more to {layer.site.id} than add a product of two matrices, so it cannot be mixed.",
                    hint="Mix plain LoRA adapters: without DoRA, lora_bias and alora_invocation_tokens.",
                )
        layers += [layer.site.name for layer in adapters.by_name[name].layers]
    if config.experts and config.target_modules is None:
        config.target_modules = [name for name in adapters.catalog.modules if name in set(layers)]


def _is_plain(patch: Patch) -> bool:
    """Tell whether a patch is a product of matrices alone, or changes nothing."""
    if not patch.low_rank:
        return not patch.changes()
    return replace(patch, up=None, down=None, scale=1.0, dropout=0.0) == Patch()
