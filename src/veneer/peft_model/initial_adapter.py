"""Saves a LoRA whose start was taken off the base: of twice the rank for the base as it was before, or as it is.

    W' = (W - scale * B_0 A_0) + scale * B A = W + scale * [B | -B_0] [A ; A_0]

The start of an adapter that was made here is known (:mod:`veneer.methods.lora`); any other is read from the adapter as
it was saved before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.configs.base import PeftConfig
from veneer.configs.lora_start_options import is_moved
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import UnsupportedError
from veneer.methods.lora import METHOD, RANK_DIMS, START_A, A
from veneer.methods.lora_starts import is_by_chance, repeats
from veneer.packages import stands_in_for_peft
from veneer.peft_model.open_adapter import find_adapter, open_adapter

# A start that is taken off the base; the config of the converted adapter does not depend on which one it was.
_MOVED = "pissa"


def keeps_start(config: PeftConfig, convert: bool | None) -> bool:
    """Tell whether an adapter is saved with its start in it, at its own rank, for those who compute the start again.

    Args:
        config: the adapter's.
        convert: whether it is to be converted. ``None``: it is; in peft's place not, where the base alone gives the
            start.

    Raises:
        UnsupportedError: nobody can compute the start again.
    """
    how = config.init_lora_weights if isinstance(config, LoraConfig) else None
    if convert is None:
        return stands_in_for_peft() and repeats(how)
    if convert or not is_moved(how):
        return False
    if is_by_chance(how):
        raise UnsupportedError(
            f"convert_start=False: the start {how!r} is another each time, so no base fits an adapter that is saved "
            "with it.",
            hint="Leave convert_start out: the adapter is then saved for the base as it is.",
        )
    return True


def with_start(adapter: Adapter, config: LoraConfig) -> Adapter:
    """Return an adapter to be saved at its own rank, with its start in it."""
    return replace(adapter, config=replace(config, init_lora_weights=True))


def take_starts_off(adapters: Adapters) -> None:
    """Take the starts of all adapters off the base's weights, as peft does when it makes them.

    Raises:
        UnsupportedError: a weight is packed.
    """
    adapters.unmerge()
    starts = [
        (layer, share, tensors)
        for adapter in adapters.by_name.values()
        for layer, share in adapter.bound_layers()
        if START_A in (tensors := layer.tensors(adapter.name, share))
    ]
    for layer, *_ in starts:
        if layer.site.is_packed:
            raise UnsupportedError(
                f"{layer.site.name} is packed, and its start cannot be taken off it.",
                hint="Take the adapters off with unload(take_starts_off=False).",
            )
    for layer, share, tensors in starts:
        layer.change_base(METHOD.start_off(share.settings, tensors, layer.site))


def with_known_start(adapter: Adapter, config: LoraConfig) -> Adapter | None:
    """Return an adapter to be saved without its start, where that lies beside its tensors; else ``None``."""
    if not any(leaf.name == START_A for _, share in adapter.bound_layers() for leaf in share.leaves):
        return None
    return replace(adapter, config=_moved(config))


def converted(
    config: LoraConfig, tensors: Mapping[str, Tensor], path: str | Path
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the config and tensors (checkpoint key -> tensor) of an adapter without its start.

    Args:
        config: of the adapter.
        tensors: of the adapter.
        path: the folder of the adapter as it was before training.

    Raises:
        UnsupportedError: the adapter did not begin as that one, or has no such form. SourceError: see ``resolve``.
    """
    initial = open_adapter(find_adapter(path, {}))
    dims = {key: dim for key in tensors for leaf, dim in RANK_DIMS.items() if key.endswith(f".{leaf}")}
    starts = initial.read(dims.keys() & initial.tensors.keys())
    unlike = [key for key in dims if key not in starts or starts[key].shape != tensors[key].shape]
    if unlike:
        raise UnsupportedError(
            f"{initial.origin} is not what the adapter began as: {unlike[0]} is missing there, or of another shape.",
            hint="Give the folder that the adapter was saved to before training, with init_lora_weights=True.",
        )
    groups = [tensors[key].shape[0] // tensors[key.replace("lora_A", "lora_B")].shape[1] for key in dims if A in key]
    if config.use_dora or config.target_parameters or any(number > 1 for number in groups):
        raise UnsupportedError(
            "An adapter with DoRA, target_parameters or on grouped convolutions is not converted for another base.",
            hint="Leave path_initial_model_for_weight_conversion out, and keep the changed base.",
        )
    halves = {key: [tensors[key], starts[key].to(tensors[key]) * (1, -1)[dim]] for key, dim in dims.items()}
    whole = {key: torch.cat(halves[key], dim) for key, dim in dims.items()}
    return METHOD.config_on_disk(_moved(config)), {**tensors, **whole}


def _moved(config: LoraConfig) -> LoraConfig:
    return replace(config, init_lora_weights=_MOVED)
