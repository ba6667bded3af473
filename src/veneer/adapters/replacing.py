"""Puts an adapter in the place of another of the same name: all of it, or the old one stays."""

from __future__ import annotations

from itertools import count

import torch

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.methods.base.method import Leaf


def spare(adapters: Adapters, name: str) -> str:
    """Return the name to load an adapter under that is to be ``name``: another one while that is taken."""
    if name not in adapters.by_name:
        return name
    return next(other for i in count() if (other := f"{name}_{i}") not in adapters.by_name)


def replace(adapters: Adapters, name: str, fresh: str) -> Adapter:
    """Let the adapter ``fresh`` be the adapter ``name``, which gives way.

    Where their tensors are alike the old ones take the new values, so that whoever holds them goes on.

    Raises:
        AdapterError: the old one is mixed by another, the new one cannot be active beside those that are, or this is
            asked for inside a call that uses the old one. Then the old one is still there, and ``fresh`` is not.
    """
    try:
        with adapters.active_selection.changing(lambda: adapters.concerned(name)):
            old, new = adapters.get(name), adapters.get(fresh)
            return _filled(old, new) if _are_alike(old, new) else _put(adapters, name, fresh)
    finally:
        if fresh in adapters.by_name:
            adapters.delete(fresh)


def _are_alike(old: Adapter, new: Adapter) -> bool:
    """Tell whether two adapters are of one method and have tensors of the same shapes and dtypes in the same places."""
    if old.swappable or type(old.config) is not type(new.config) or old.layers.exclusive != new.layers.exclusive:
        return False
    if old.layers.merged(old.name):
        return False
    return _kinds(old) == _kinds(new) and _shares(old) == _shares(new)


def _kinds(adapter: Adapter) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {place: (tensor.shape, tensor.dtype) for place, tensor in adapter.tensors_by_place().items()}


def _shares(adapter: Adapter) -> list[tuple[str, type, tuple[Leaf, ...], str | None]]:
    return [(layer.site.id, type(s.method), s.leaves, s.key) for layer, s in adapter.bound_layers()]


@torch.no_grad()
def _filled(old: Adapter, new: Adapter) -> Adapter:
    """Give the old adapter the new one's values and settings."""
    values = new.tensors_by_place()
    for place, tensor in old.tensors_by_place().items():
        tensor.copy_(values[place])
    for part, fresh in zip(old.parts, new.parts, strict=True):
        part.take_settings(old.name, fresh, new.name)
    fields = ("config", "origin", "tensors_bound", "unused_keys", "notes", "allocation", "saved_dtypes", "trainable")
    for field in fields:
        setattr(old, field, getattr(new, field))
    old.remake_modules()
    return old


def _put(adapters: Adapters, name: str, fresh: str) -> Adapter:
    """Put the new adapter under the old one's name, in its place among the others, selected if that was."""
    adapters.check_unused(name)
    order = list(adapters.by_name)
    active = tuple(fresh if other == name else other for other in adapters.active_selection.default.names)
    adapters.select(active)
    adapters.delete(name)
    adapters.rename(fresh, name)
    adapters.by_name = {other: adapters.by_name[other] for other in order if other != fresh}
    return adapters.get(name)
