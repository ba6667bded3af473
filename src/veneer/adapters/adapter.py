"""One adapter on a model: its config, its layers and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.configs.base import AnyConfig


@dataclass
class Adapter:
    """One adapter on a model.

    Attributes:
        name: its name here.
        config: its config.
        origin: where it came from; ``None`` for one made here.
        layers: the names of the layers it adapts, in the model's order.
        whole_modules: the names of the modules that it brings whole.
        vocabulary_rows: those of them that are no part of it and are never trained: a grown vocabulary's rows.
        trainable: whether its tensors are to be trained while it is selected.
        zero_layers: those of ``layers`` in which it changes nothing, known when it was loaded.
        tensors_bound: how many of its checkpoint's tensors are in use.
        base_digest: the digest of the base it was trained on, where the checkpoint records it.
        notes: what was odd about it.
        shared: the tensors that all of its layers use.
        unpadded: checkpoint key -> tensor, where what is in memory is padded and this is to be saved.
        virtual_tokens: how many it puts before the input or into the cache; none for a method that adapts layers.
        allocation: what training has learned of an AdaLoRA's ranks, or of an AdaMSS's groups.
        saved_dtypes: checkpoint key -> dtype on disk, for tensors that are wider in memory and saved as they were.
        exclusive: whether no other such adapter can be active beside it.
    """

    name: str
    config: AnyConfig
    origin: str | None = None
    layers: list[str] = field(default_factory=list)
    whole_modules: list[str] = field(default_factory=list)
    vocabulary_rows: set[str] = field(default_factory=set)
    trainable: bool = False
    zero_layers: list[str] = field(default_factory=list)
    tensors_bound: int = 0
    base_digest: str | None = None
    notes: list[str] = field(default_factory=list)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    unpadded: dict[str, Tensor] = field(default_factory=dict)
    virtual_tokens: int = 0
    allocation: Any = None
    saved_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    exclusive: bool = False
