"""What training decides as it goes: the ranks of an AdaLoRA, and the groups of an AdaMSS, that are worth it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.config import PeftConfig
from veneer.configs.adalora import AdaLoraConfig
from veneer.configs.adamss import AdamssConfig
from veneer.errors import AdapterError
from veneer.methods import method_of
from veneer.methods.group_allocation import GroupAllocation
from veneer.methods.rank_allocation import RankAllocation

if TYPE_CHECKING:
    from veneer.adapters import Adapter, Adapters


def allocate(adapters: Adapters, step: int) -> None:
    """Let each adapter that is being trained, and allocates what it trains, do so as its config says for ``step``.

    Raises:
        AdapterError: none of those that are active and trainable does.
    """
    trained = [entry for name in adapters.active if (entry := adapters.entries[name]).trainable]
    found = [(entry, kind) for entry in trained if (kind := _kind(entry.config)) is not None]
    if not found:
        raise AdapterError(
            "update_and_allocate needs an active, trainable AdaLoRA whose config has a total_step, or AdaMSS whose "
            "config has use_asa.",
            hint="Make it with AdaLoraConfig(total_step=...) or AdamssConfig(use_asa=True), or load it with "
            "is_trainable=True.",
        )
    for adapter, kind in found:
        adapter.allocation = adapter.allocation or kind()
        adapter.allocation.step(adapter.config, _layers(adapters, adapter), step)


def _kind(config: PeftConfig) -> type[RankAllocation | GroupAllocation] | None:
    if isinstance(config, AdaLoraConfig) and config.total_step is not None:
        return RankAllocation
    return GroupAllocation if isinstance(config, AdamssConfig) and config.use_asa else None


def _layers(adapters: Adapters, adapter: Adapter) -> list[Mapping[str, Tensor]]:
    """The tensors of each layer of an adapter, without its biases."""
    own = type(method_of(adapter.config))
    return [
        adapters.layers[module].tensors(adapter.name, share)
        for module in adapter.layers
        for share in adapters.layers[module].bound[adapter.name]
        if isinstance(share.method, own)
    ]
