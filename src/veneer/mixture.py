"""Adapters of one layer that are mixed token by token: what Arrow and X-LoRA route over.

    added = sum_i w_i(token) * scale_i * U_i V_i x

The adapters, *experts*, are on the model under names of their own and stay what they are. The one that mixes them has
a config that names them (``experts``), and a patch with a route on every layer that one of them adapts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.codec import PREFIX
from veneer.config import TargetedConfig
from veneer.errors import AdapterError, UnsupportedError
from veneer.methods.method import Base
from veneer.patch import Patch
from veneer.sites import Site
from veneer.source import ADAPTER_CONFIG, Source, exists, read_header, resolve, weight_files

if TYPE_CHECKING:
    from veneer.adapters import Adapters


class Live(Base, Protocol):
    """A live layer, to which other adapters are bound."""

    def here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``names`` that are bound to it."""
        ...

    def patches(self, names: Sequence[str]) -> list[Patch]:
        """What adapters that are bound to it mean for it."""
        ...


def mixed(site: Site, experts: Sequence[Patch], weights: Tensor, x: Tensor, training: bool) -> Tensor:
    """What experts add to a layer's output.

    Args:
        site: the layer.
        experts: low-rank patches, which may have different ranks.
        weights: of each expert at each token, shape ``(..., experts)``.
        x: the layer's input, shape ``(..., in)``; token ids, shape ``(...)``, of an embedding.
        training: whether dropout is on.
    """
    added = [
        _weighed(site, patch, weight, x, training) for patch, weight in zip(experts, weights.unbind(-1), strict=True)
    ]
    return torch.stack(added).sum(0)


def _weighed(site: Site, patch: Patch, weight: Tensor, x: Tensor, training: bool) -> Tensor:
    assert patch.up is not None
    assert patch.down is not None
    dtype = patch.down.dtype
    if x.is_floating_point():
        dtype = torch.promote_types(x.dtype, dtype)
        x = F.dropout(x.to(dtype), patch.dropout, training)
    hidden = site.product(x, patch.down.to(dtype)) * weight.unsqueeze(-1).to(dtype)
    return site.mix(hidden, patch.up.to(dtype)) * patch.scale


def meet_experts(config: TargetedConfig, adapters: Adapters) -> None:
    """Check that the adapters that ``config`` mixes are on the model, and take their layers where it names none.

    Raises:
        AdapterError: one is not there.
        UnsupportedError: one does more than add a product of two matrices.
    """
    layers = []
    for name in config.experts:
        if name not in adapters.entries:
            raise AdapterError(
                f"The adapter mixes {list(config.experts)}, and {name!r} is not on this model.",
                hint="Load those first, under these names.",
            )
        for layer in adapters.entries[name].layers:
            if not all(_is_plain(patch) for patch in adapters.layers[layer].patches([name])):
                raise UnsupportedError(
                    f"{name!r} does more to {layer} than add a product of two matrices, so it cannot be mixed.",
                    hint="Mix plain LoRA adapters: without DoRA, lora_bias and alora_invocation_tokens.",
                )
        layers += [adapters.layers[layer].site.name for layer in adapters.entries[name].layers]
    if config.experts and config.target_modules is None:
        config.target_modules = [name for name in adapters.catalog.modules if name in set(layers)]


def check_unused(name: str, adapters: Adapters) -> None:
    """Raise ``AdapterError`` when another adapter mixes the one of that name."""
    users = [other for other, entry in adapters.entries.items() if name in entry.config.experts]
    if users:
        raise AdapterError(
            f"{users[0]!r} mixes {name!r}, which therefore has to stay as it is.",
            hint=f"Delete {users[0]!r} first.",
        )


def low_rank_patches(layer: Live, names: tuple[str, ...]) -> list[Patch]:
    """The product of matrices that each expert, bound to a layer, adds there."""
    return [patch for patch in layer.patches(names) if patch.low_rank]


def expert_source(name: str, index: int, path: str, beside: Source | None) -> Source:
    """Where an expert is: beside the adapter, in a folder of its name or number; else where ``path`` says."""
    if beside is None or beside.file is not None:
        return resolve(path, what="adapter")
    for folder in (name, str(index)):
        own = replace(beside, root=beside.root / folder, origin=f"{beside.origin}/{folder}")
        if own.has(ADAPTER_CONFIG) and _is_whole(own):
            return own
    relative = beside.root / path
    return resolve(relative if exists(relative) else path, what="adapter")


def _is_whole(source: Source) -> bool:
    """Whether a LoRA beside an X-LoRA is one: peft 0.21 writes a part of it there, and a part of the base."""
    headers = [read_header(path) for path in weight_files(source, "adapter_model")]
    return all(key.startswith(PREFIX) for header in headers for key in header.tensors)


def _is_plain(patch: Patch) -> bool:
    """Whether it is a product of matrices alone; a copy of the base's weights beside one says nothing."""
    if not patch.low_rank:
        return not patch.changes()
    return replace(patch, up=None, down=None, scale=1.0, dropout=0.0) == Patch()
