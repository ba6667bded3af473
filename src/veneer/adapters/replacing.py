"""An adapter in the place of another of the same name: all of it, or the old one stays."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters


def spare(adapters: Adapters, name: str) -> str:
    """Under which name an adapter is loaded that is to be ``name``: another one while that is taken."""
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
        with adapters.switch.changing(lambda: adapters.concerned(name)):
            return _filled(adapters, name, fresh) if _are_alike(adapters, name, fresh) else _put(adapters, name, fresh)
    finally:
        if fresh in adapters.by_name:
            adapters.delete(fresh)


def own_tensors(adapters: Adapters, name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter that lies on the model, frozen ones included, by its place."""
    entry = adapters.get(name)
    found = {
        f"{site}.{place}": tensor
        for site in entry.layers
        for place, tensor in adapters.layers[site].own_tensors(name).items()
    }
    for root in entry.whole_modules:
        own = adapters.copy_of(root, name).state_dict(keep_vars=True)
        found.update((f"{root}.{leaf}", tensor) for leaf, tensor in own.items())
    if name in adapters.prompts:
        own = adapters.prompts.encoder(name).state_dict(keep_vars=True)
        found.update((f"prompt.{leaf}", tensor) for leaf, tensor in own.items())
    return found


def _are_alike(adapters: Adapters, name: str, fresh: str) -> bool:
    """Whether two adapters are of one method and have tensors of the same shapes and dtypes in the same places."""
    old, new = adapters.get(name), adapters.get(fresh)
    if old.unpadded or type(old.config) is not type(new.config) or old.exclusive != new.exclusive:
        return False
    kinds = [{place: (t.shape, t.dtype) for place, t in own_tensors(adapters, n).items()} for n in (name, fresh)]
    shares = [
        {site: [(type(s.method), s.leaves, s.key) for s in adapters.layers[site].bound[n]] for site in entry.layers}
        for n, entry in ((name, old), (fresh, new))
    ]
    merged = any(name in adapters.layers[site].merged for site in old.layers)
    return kinds[0] == kinds[1] and shares[0] == shares[1] and not merged


@torch.no_grad()
def _filled(adapters: Adapters, name: str, fresh: str) -> Adapter:
    """The old adapter with the new one's values and settings."""
    old, new = adapters.get(name), adapters.get(fresh)
    values = own_tensors(adapters, fresh)
    for place, tensor in own_tensors(adapters, name).items():
        tensor.copy_(values[place])
    for site in old.layers:
        layer = adapters.layers[site]
        for share, other in zip(list(layer.bound[name]), layer.bound[fresh], strict=True):
            layer.reset(name, share, other.settings)
    if name in adapters.prompts:
        adapters.prompts.configs[name] = adapters.prompts.configs[fresh]
    for field in (
        "config",
        "origin",
        "zero_layers",
        "vocabulary_rows",
        "tensors_bound",
        "notes",
        "allocation",
        "saved_dtypes",
        "trainable",
    ):
        setattr(old, field, getattr(new, field))
    return old


def _put(adapters: Adapters, name: str, fresh: str) -> Adapter:
    """The new adapter under the old one's name, in its place among the others, selected if that was."""
    places = list(adapters.by_name)
    wanted = tuple(fresh if one == name else one for one in adapters.switch.default.names)
    adapters.selection(wanted)
    adapters.delete(name)
    adapters.rename(fresh, name)
    adapters.by_name = {one: adapters.by_name[one] for one in places if one != fresh}
    adapters.select(tuple(name if one == fresh else one for one in wanted))
    return adapters.get(name)
