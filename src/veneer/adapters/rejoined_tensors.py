"""Tensors that several layers use, found again after another object was put in the place of one.

``load_state_dict(assign=True)`` and some moves exchange a module's parameters. A layer looks its own ones up; one that
another layer holds it knows by itself.
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
    found: dict[int, nn.Parameter] = {}
    for layer in adapters.adapted_layers:
        for adapter, kept in layer.held.items():
            found |= {id(old): layer.placed(adapter, leaf) for leaf, old in kept.items()}
    if all(id(now) == old for old, now in found.items()):
        return

    def now(tensors: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {leaf: found.get(id(tensor), tensor) for leaf, tensor in tensors.items()}

    for layer in adapters.adapted_layers:
        layer.held = {adapter: now(kept) for adapter, kept in layer.held.items()}
        for adapter, shares in layer.bound.items():
            layer.bound[adapter] = [replace(share, shared=now(share.shared)) for share in shares]
        layer.forget_cached()
    for entry in adapters.by_name.values():
        entry.layers.shared = now(entry.layers.shared)
