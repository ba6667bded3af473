"""Gives layers that share a tensor the new one, after another object was put in its place.

``load_state_dict(assign=True)`` and some moves exchange a module's parameters. A layer looks up its own by name, but
keeps a reference to one that another layer holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters


def rejoin(adapters: Adapters) -> None:
    """Let all layers use the tensors that are held now."""
    current: dict[int, nn.Parameter] = {}
    for layer in adapters.adapted_layers:
        for adapter, tensors in layer.held.items():
            current |= {id(old): layer.placed(adapter, leaf) for leaf, old in tensors.items()}
    if all(id(new) == old for old, new in current.items()):
        return

    def now(tensors: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {leaf: current.get(id(tensor), tensor) for leaf, tensor in tensors.items()}

    for layer in adapters.adapted_layers:
        layer.held = {adapter: now(tensors) for adapter, tensors in layer.held.items()}
        for adapter, shares in layer.bound.items():
            layer.bound[adapter] = [replace(share, shared=now(share.shared)) for share in shares]
        layer.forget_cached()
    for entry in adapters.by_name.values():
        entry.layers.shared = now(entry.layers.shared)
