"""Folds an adapter: its form on each layer with which rows of several adapters are computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.errors import UnsupportedError
from veneer.patches.fused import FusedPatch, TensorVersions
from veneer.patches.patch import Patch
from veneer.patches.selection import NOTHING


@dataclass(frozen=True)
class FoldedAdapter:
    """Holds the fused form of an adapter on each layer that has one.

    Attributes:
        parts: the id of a layer's site -> the adapter's fused form there.
        row_by_row: the modules that compute its rows one adapter after the other, by name.
        versions: tells whether the adapter was changed since.
    """

    parts: Mapping[str, FusedPatch]
    row_by_row: Mapping[str, object]
    versions: FoldedVersions

    @property
    def rank(self) -> int:
        """The highest rank of a layer's products; 0 for an adapter of vectors alone."""
        return max((part.down.shape[1] for part in self.parts.values() if part.down is not None), default=0)

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(part.nbytes for part in self.parts.values())


class FoldedVersions(TensorVersions):
    """Tells whether a frozen adapter was changed since it was folded."""

    __slots__ = ()

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(NOTHING, tensors)
        self._call = None  # none of them is trained


def fold(adapters: Adapters, adapter: Adapter) -> FoldedAdapter:
    """Return the folded form of an adapter, computed in float32.

    Raises:
        UnsupportedError: no packed batch can hold it.
    """
    check_foldable(adapters, adapter)
    versions = FoldedVersions([t for layer in adapter.layers.adapted for t in layer.sources((adapter.name,))])
    parts: dict[str, FusedPatch] = {}
    row_by_row: dict[str, object] = dict(adapter.whole_modules.copies)
    with torch.inference_mode(False), torch.no_grad():
        for layer in adapter.layers.adapted:
            patches = layer.patches([adapter.name])
            check_patches(adapter, patches)
            fused = layer.fused_patch(patches)
            if fused is None:
                row_by_row[layer.site.name] = layer
            else:
                parts[layer.site.id] = fused
    return FoldedAdapter(parts, row_by_row, versions)


def check_foldable(adapters: Adapters, adapter: Adapter) -> None:
    """Raise ``UnsupportedError`` where a bank cannot hold an adapter, as far as its config tells."""
    if adapter.prompt is not None:
        raise _refused(adapter, "its virtual tokens would lengthen the rows of the batch")
    if any(hook.is_for(adapter) for hook in adapters.hooks):
        raise _refused(adapter, "it acts on each row as a whole, and a packed row holds several sequences")
    if adapter.trainable:
        raise UnsupportedError(
            f"{adapter.name!r} is being trained, and a bank keeps what it was when it came.",
            hint=f"model.set_requires_grad({adapter.name!r}, False) freezes it.",
        )


def check_patches(adapter: Adapter, patches: Sequence[Patch]) -> None:
    """Raise ``UnsupportedError`` where a bank cannot hold an adapter with these patches."""
    if any(patch.route is not None for patch in patches):
        raise _refused(adapter, "what it adds is chosen for each row anew")
    if any(patch.gate is not None for patch in patches):
        raise _refused(adapter, "it acts on some tokens of a row only")


def _refused(adapter: Adapter, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{adapter.name!r} ({adapter.config.peft_type}) cannot be in a bank: {why}.",
        hint=f"Run its rows by themselves: with model.using({adapter.name!r}): model(...).",
    )
