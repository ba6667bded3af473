"""The results that inference keeps of a layer from one call to the next: fused patches, and weights that are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import NoneType
from typing import TypeVar

import torch
from torch import Tensor

from veneer.base_model.sites.site import Site
from veneer.layers.merged_copy import CopyForward
from veneer.layers.training_forward import TrainingForward
from veneer.patches.fused import CachedForward, FusedPatch, TensorVersions
from veneer.patches.mixed_batch import CachedMixedForward
from veneer.patches.patch import Patch
from veneer.patches.route import CacheableRoute
from veneer.patches.selection import Selection

Kept = TypeVar("Kept", "CachedForward", "CachedWeight")

# Lowered patches are kept up to one such part of the weight's own memory.
KEPT_PART = 2
# The selections whose forward passes are kept: benchmarks/notes.md, Unmerged forward.
KEPT_SELECTIONS = 4


class InferenceCache:
    """Holds what inference keeps of a layer in one state; with the next state comes another cache.

    What is begun in one state and ready in the next is kept in the old cache, where nobody looks for it any more.

    Attributes:
        forward: the forward pass under the last selection.
        forwards: selected adapters -> the forward pass, for the last few selections; the last used comes last.
        mixed: that of the adapters of the last batch that held several.
        weight: the weight for a model that reads it instead of calling the layer.
        copies: selected adapters -> the forward pass with their merged copy.
        training: the forward pass of the last training step, where that can be kept.
    """

    __slots__ = ("copies", "forward", "forwards", "mixed", "training", "weight")

    def __init__(self) -> None:
        self.forward: CachedForward | None = None
        self.mixed: CachedMixedForward | None = None
        self.weight: CachedWeight | None = None
        self.copies: dict[tuple[str, ...], CopyForward] = {}
        self.training: TrainingForward | None = None
        self.forwards: dict[tuple[str, ...], tuple[CachedForward, object]] = {}

    def without(self, adapter: str, sources: Callable[[tuple[str, ...]], list[Tensor]]) -> InferenceCache:
        """Return the cache of the next state, in which nothing is kept of an adapter and all of the others.

        Args:
            adapter: its name.
            sources: gives the tensors of adapters.
        """
        rest = InferenceCache()
        if self.forward is None and self.mixed is None and self.weight is None:  # as while adapters are loaded
            return rest
        rest.forward = _without(adapter, self.forward)
        rest.weight = _without(adapter, self.weight)
        rest.copies = {names: kept for names, kept in self.copies.items() if adapter not in names}
        rest.forwards = {names: kept for names, kept in self.forwards.items() if adapter not in names}
        rest.mixed = None if self.mixed is None else self.mixed.without(adapter, sources)
        return rest

    def earlier_forward(self, selection: Selection, site: Site) -> CachedForward | None:
        """Return the forward pass under a selection that was used before, unless a tensor changed since."""
        cached, base = self.forwards.get(selection.names, (None, None))
        return cached if cached is not None and cached.is_current(selection) and base == _base_state(site) else None

    def keep_forward(self, cached: CachedForward, site: Site) -> None:
        """Make ``cached`` the forward pass under the last selection, and keep as many before it as memory allows."""
        self.forward = cached
        if cached.forward is None:
            return
        kept, room = [(cached, _base_state(site))], site.stored.nbytes // KEPT_PART - cached.nbytes
        for earlier, base in reversed(self.forwards.values()):
            if earlier.selected != cached.selected and earlier.nbytes <= room and len(kept) < KEPT_SELECTIONS:
                kept.append((earlier, base))
                room -= earlier.nbytes
        # Replaced whole, for threads share it.
        self.forwards = {entry[0].selected: entry for entry in reversed(kept)}

    def mixed_forward(
        self,
        selection: Selection,
        names: tuple[str, ...],
        sources: Callable[[tuple[str, ...]], list[Tensor]],
        fused_patch: Callable[[tuple[str, ...]], FusedPatch | None],
    ) -> CachedMixedForward:
        """Return the stacked form of several adapters; made anew when a tensor changed, or for other adapters.

        Args:
            selection: of the call.
            names: the adapters.
            sources: gives the tensors of adapters.
            fused_patch: gives the fused patch of adapters, where they have one.
        """
        cached = self.mixed
        is_current = cached is not None and cached.is_current(selection)
        if cached is None or not is_current or cached.names != names:
            known = cached.members if cached is not None and is_current else {}
            cached = self.mixed = CachedMixedForward(selection, names, sources(names), known, fused_patch)
        return cached

    def read_weight(
        self, selection: Selection, sources: Callable[[], list[Tensor]], make: Callable[[], Tensor]
    ) -> Tensor:
        """Return the weight under a selection; made anew when a tensor changed, or for another selection.

        Args:
            selection: of the call.
            sources: gives the tensors of its adapters.
            make: makes the weight.
        """
        cached = self.weight
        if cached is None or cached.selected != selection.names or not cached.is_current(selection):
            cached = self.weight = CachedWeight(selection, sources(), make)
        return cached.weight


class CachedWeight(TensorVersions):
    """The weight, as stored, that a layer has under a selection.

    Args:
        selection: the selection.
        sources: the tensors that it is made from.
        make: makes it.
    """

    __slots__ = ("selected", "weight")

    @torch.no_grad()
    def __init__(self, selection: Selection, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> None:
        super().__init__(selection, sources)
        self.selected = selection.names
        self.weight = make()


def _without(adapter: str, kept: Kept | None) -> Kept | None:
    """Return what is kept for a selection, unless it holds an adapter."""
    return None if kept is None or adapter in kept.selected else kept


def _base_state(site: Site) -> object:
    """Return what differs once the base layer's parameters are exchanged or changed in place."""
    tensors = [tensor for tensor in (site.stored, site.bias) if tensor is not None]
    return [(id(tensor), None if tensor.is_inference() else tensor._version) for tensor in tensors]


def are_small(patches: Sequence[Patch], site: Site) -> bool:
    """Tell whether inference can keep lowered patches: a matrix as large as the weight would double the base."""
    if site.shift_only or any(not isinstance(patch.route, (CacheableRoute, NoneType)) for patch in patches):
        return False
    return KEPT_PART * sum(patch.nbytes for patch in patches) <= site.stored.nbytes


def for_inference(patch: Patch, dtype: torch.dtype) -> Patch:
    """Return a patch as inference keeps it."""
    return replace(patch, route=patch.route.for_inference(dtype)) if isinstance(patch.route, CacheableRoute) else patch
