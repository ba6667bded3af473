"""The facts about an adapter, and the protocol of the parts that hold its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from veneer.configs.base import AnyConfig
from veneer.layers.wrapping import LayerPlacement
from veneer.methods import method_of
from veneer.methods.base.abilities import Allocation

if TYPE_CHECKING:
    from typing import Self

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass
class AdapterRecord:
    """The facts about an adapter that are no tensors on the model.

    Attributes:
        name: its name on the model.
        config: its config, completed with what the model says.
        saved_config: the config that is saved, where ``config`` was changed for weights to come.
        origin: its folder or hub id; ``None`` for one made here.
        trainable: True where its tensors are to be trained while it is selected.
        tensors_bound: the number of its checkpoint's tensors that are in use.
        unused_keys: the keys of its checkpoint's tensors that are not.
        base_digest: the digest of the base it was trained on, where the checkpoint records it.
        notes: oddities of its checkpoint, for the load report.
        swappable: True where it is prepared for the weights of other adapters, of any rank.
        allocation: the allocation of an AdaLoRA's ranks, or of an AdaMSS's groups, once training has begun one.
        saved_dtypes: checkpoint key -> dtype on disk, for tensors that are wider in memory and saved as they were.
    """

    name: str
    config: AnyConfig
    origin: str | None = None
    trainable: bool = False
    tensors_bound: int = 0
    unused_keys: list[str] = field(default_factory=list)
    base_digest: str | None = None
    notes: list[str] = field(default_factory=list)
    swappable: bool = False
    saved_config: AnyConfig | None = None
    allocation: Allocation | None = None
    saved_dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The beginning of the checkpoint keys of modules that it brings whole."""
        return method_of(self.config).prefix


class Claim(NamedTuple):
    """Something that only one of the active adapters can have.

    Attributes:
        conflict: of two adapters that have it, completes "'a' and 'b' ...".
        remedy: how they can be used nevertheless.
    """

    conflict: str
    remedy: str = "Select one of them."


class AdapterPart(Protocol):
    """The tensors of an adapter in places of one kind. Each method is given the adapter that it is a part of."""

    def parameters(self, adapter: AdapterRecord) -> Iterable[nn.Parameter]:
        """Return the parameters that are trained."""

    def named_tensors(self, adapter: AdapterRecord, value: Callable[[Tensor], Tensor]) -> NamedTensors:
        """Return the tensors to be saved, made from what ``value`` gives for those in memory, by checkpoint key."""

    def tensors(self, adapter: AdapterRecord) -> Iterable[Tensor]:
        """Return the tensors in memory that a checkpoint holds."""

    def tensors_by_place(self, adapter: AdapterRecord) -> NamedTensors:
        """Return every tensor on the model, frozen ones included, by the name of its place."""

    def claims(self, adapter: AdapterRecord) -> Iterable[Claim]:
        """Return the claims that no other active adapter can have beside this one."""

    def check_mergeable(self, adapter: AdapterRecord) -> None:
        """Raise ``MergeError`` when the base's weights cannot hold it."""

    def take_settings(self, name: str, other: Self, other_name: str) -> None:
        """Take the settings of another adapter's part, which is of the same method and in the same places."""

    def rename(self, old: str, new: str) -> None:
        """Give the tensors of the adapter ``old`` to the name ``new``."""

    def remove(self, adapter: AdapterRecord, placement: LayerPlacement) -> None:
        """Take the tensors off the model, and the modules that then hold none."""
