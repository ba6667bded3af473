"""Gives a new adapter tensors without memory, whose values come later: peft's ``low_cpu_mem_usage``."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.methods import method_of
from veneer.methods.base.abilities import DerivesTensors, StoresShared


def drop_values(adapters: Adapters, adapter: Adapter) -> None:
    """Put tensors on the meta device in the places of a new adapter's, unless its layers share or derive some."""
    if adapter.prompt is not None or isinstance(method_of(adapter.config), (StoresShared, DerivesTensors)):
        return
    with adapters.changing():
        for layer in adapter.layers.adapted:
            layer.exchange(adapter.name, lambda tensor: torch.empty_like(tensor, device="meta"))


def make_room(adapters: Adapters, adapter: Adapter) -> None:
    """Put tensors of zeros on their layer's device in the places of those on the meta device."""
    if not any(tensor.is_meta for tensor in adapter.tensors_by_place().values()):
        return
    with adapters.changing():
        for layer in adapter.layers.adapted:
            device = layer.site.device

            def room(tensor: Tensor, device: torch.device = device) -> Tensor:
                return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach()

            layer.exchange(adapter.name, room)
