"""Checks the adapters that another one mixes (its experts)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.configs.arrow_options import ArrowConfig
from veneer.configs.base import TargetedConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.layers.adapter_shares import LayerAdapters
from veneer.patches.patch import Patch
from veneer.printing import warn

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


def join_routers(adapters: Adapters, name: str) -> None:
    """Let the Arrow routers on the model send tokens to a LoRA that was loaded after them, as in peft.

    One that a router cannot mix stays out, with a warning.
    """
    layers = {layer.site.id: layer for layer in adapters.by_name[name].layers}
    for router, entry in adapters.by_name.items():
        arrow = getattr(entry.config, "arrow_config", None)
        shared = [layer for layer in entry.layers if layer.site.id in layers]
        if arrow is None or router == name or name in arrow.experts or not shared:
            continue
        if not all(_fits(layer, name, arrow) for layer in shared):
            warn(
                f"{name!r} takes no part in {router!r}, which mixes plain LoRA adapters, and of one rank where it "
                "takes general ones off."
            )
            continue
        with adapters.changing((router,)):
            arrow.task_adapter_names = [*(arrow.task_adapter_names or ()), name]
            for layer in shared:
                for share in layer.bound[router]:
                    layer.reset(router, share, share.settings)


def _fits(layer: LayerAdapters, name: str, arrow: ArrowConfig) -> bool:
    """Tell whether a router can mix an adapter on a layer with those that it mixes there."""
    patches = layer.patches([name])
    if not all(_is_plain(patch) for patch in patches):
        return False
    general = layer.patches(layer.here(tuple(arrow.gks_adapter_names or ()))) if arrow.use_gks else []
    return not general or _ranks(patches) == _ranks(general)


def _ranks(patches: Iterable[Patch]) -> set[int]:
    return {patch.down.shape[0] for patch in patches if patch.down is not None}


def _is_plain(patch: Patch) -> bool:
    """Tell whether a patch is a product of matrices alone, or changes nothing."""
    if not patch.low_rank:
        return not patch.changes()
    return replace(patch, up=None, down=None, scale=1.0, dropout=0.0) == Patch()
