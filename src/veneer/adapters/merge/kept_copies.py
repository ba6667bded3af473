"""Keeps merged copies of adapters' weights beside the base's, in as much memory as is allowed."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters.merge.in_memory import check_mergeable, is_in_memory
from veneer.adapters.merge.worker_threads import for_each
from veneer.errors import AdapterError, UnsupportedError, UsageError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.merged_copy import MergedCopy, copy_nbytes, obstacle
from veneer.patches.watched_parameters import unwatch_base
from veneer.patches.weight_arithmetic import BLOCK, row_blocks
from veneer.printing import Report, nbytes, parse_bytes

if TYPE_CHECKING:
    from veneer.adapters.collection import Adapters

# Adapters that are selected together, in their order.
Names = tuple[str, ...]

NO_MEMORY = "the memory is used up"
OUT_OF_DATE = "its weights have changed since; keep_merged(...) merges them again"


@dataclass(frozen=True)
class KeptAdapterReport:
    """Reports on the merged copies of one adapter, or of several that are selected together.

    Attributes:
        names: the adapters.
        layers: the layers that they adapt.
        kept: those of which a merged copy is kept.
        nbytes: the bytes of the copies.
        unmerged: reason -> the layers that run unmerged for it.
    """

    names: Names
    layers: list[str]
    kept: list[str]
    nbytes: int
    unmerged: dict[str, list[str]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The adapters' names."""
        return " + ".join(self.names)


@dataclass(frozen=True)
class MergedCopiesReport(Report):
    """Reports which merged copies a model keeps beside its base: see :meth:`PeftModel.keep_merged`.

    Attributes:
        adapters: a report for each adapter, or for each set of them, the hottest first.
        nbytes: the bytes of all copies; what several share counts once.
        memory: the bytes that they may take; ``None`` for no bound.
    """

    adapters: list[KeptAdapterReport]
    nbytes: int
    memory: int | None = None

    _title = "merged copies"

    @property
    def summary(self) -> str:
        """The copies of each adapter, in a line."""
        return "; ".join(f"{adapter.title}: {_line(adapter)}" for adapter in self.adapters)

    @property
    def warnings(self) -> list[str]:
        """The layers that run unmerged, and why, a line for each reason."""
        return [
            f"{adapter.title}: {len(layers)} of {len(adapter.layers)} layers run unmerged (first: {layers[0]}): {why}."
            for adapter in self.adapters
            for why, layers in adapter.unmerged.items()
        ]

    def _facts(self) -> list[tuple[str, str]]:
        bound = "" if self.memory is None else f" of {nbytes(self.memory)}"
        return [("memory", nbytes(self.nbytes) + bound), *((a.title, _line(a)) for a in self.adapters)]

    def _warnings(self) -> list[str]:
        return self.warnings


def _line(adapter: KeptAdapterReport) -> str:
    return f"{len(adapter.kept)} of {len(adapter.layers)} layers, {nbytes(adapter.nbytes)}"


@dataclass(frozen=True)
class _Place:
    """A layer and those of a selection's adapters that are on it: the place of one copy."""

    site_id: str
    layer: AdaptedLayer
    names: Names

    @property
    def key(self) -> tuple[str, Names]:
        return self.site_id, self.names

    @property
    def copy(self) -> MergedCopy | None:
        """The copy that is kept there, if it is not out of date."""
        return self.layer.merged_copy(self.names)

    @property
    def tensors(self) -> frozenset[int]:
        """The tensors that the copy is made of, which tied layers may share."""
        return frozenset(map(id, (*self.layer.parameters_below(self.names), *self.layer.sources(self.names))))

    def may_share(self, first: _Place | None) -> bool:
        """Tell whether the copy may be that of another place, if there is one, whose tensors are the same."""
        return first is not None and (self.copy is None or first.copy is None or self.copy.weight is first.copy.weight)


@dataclass
class _Plan:
    """The copies that are to be kept.

    Attributes:
        chosen: the places whose copies fit into the memory.
        twins: a place -> an earlier one whose copy is made of the same tensors, so that it may be the same.
        left: the places of the copies that are not kept, with the reasons.
        nbytes: the bytes of the copies that are no twins.
        memory: the most bytes.
    """

    memory: float
    chosen: list[_Place] = field(default_factory=list)
    twins: dict[_Place, _Place] = field(default_factory=dict)
    left: dict[tuple[str, Names], str] = field(default_factory=dict)
    nbytes: int = 0

    def takes(self, place: _Place) -> bool:
        """Tell whether a place's copy fits, which then counts."""
        size = copy_nbytes(place.layer, place.names)
        if self.nbytes + size > self.memory:
            self.left[place.key] = NO_MEMORY
            return False
        self.nbytes += size
        return True


class MergedCopies:
    """Makes, drops and reports on the merged copies of one model.

    The layers hold the copies, and drop those that are out of date. A deep copy or a pickle of the model has none.

    Args:
        adapters: of the model.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._selections: list[Names] = []
        self._memory: int | None = None
        # The place of a copy that was never made -> the reason.
        self._left: dict[tuple[str, Names], str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_adapters": self._adapters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    # -- keeping -------------------------------------------------------------------------------------------

    def keep(self, selections: Sequence[str | Sequence[str]], memory: str | float | None) -> None:
        """Keep merged copies for these selections, the hottest first, and drop all others.

        Copies are made while calls of the model go on; they begin to be used between two calls.

        Args:
            selections: an adapter's name, or the names of several that are selected together, for each.
            memory: the most bytes that they may take.
        """
        size = _size(memory)
        wanted = [self._checked(names) for names in dict.fromkeys(map(_names, selections))]
        with self._lock:
            self._keep(wanted, size)

    def _checked(self, names: Names) -> Names:
        """Check that adapters can be selected together, and merged.

        Raises:
            UnknownAdapterError, AdapterError: they cannot be selected. MergeError: no weight can hold one of them.
            UnsupportedError: no layer can keep a copy.
        """
        adapters = self._adapters
        adapters.selection(names)
        check_mergeable(adapters, names)
        trained = [name for name in names if adapters.get(name).trainable]
        if trained:
            raise AdapterError(
                f"{trained[0]!r} is to be trained, so that its merged weights would be out of date after each step.",
                hint=f"Call set_requires_grad({trained[0]!r}, False) first.",
            )
        obstacles = {place.site_id: obstacle(place.layer, place.names) for place in self._places([names])}
        if obstacles and all(obstacles.values()):
            first, reason = next(iter(obstacles.items()))
            raise UnsupportedError(
                f"No merged weight of {' + '.join(names)} can be kept: at {first} {reason}.",
                hint="Use the adapter unmerged, or merge it: merge_adapter(...), or `veneer merge`.",
            )
        return names

    def _places(self, selections: Sequence[Names]) -> Iterator[_Place]:
        """Yield the places of the copies for selections; one that several of them share comes once."""
        seen = set()
        for names in selections:
            for site_id, layer in list(self._adapters.layers.items()):
                if isinstance(layer, AdaptedLayer) and layer.here(names):
                    place = _Place(site_id, layer, layer.here(names))
                    if place.key not in seen:
                        seen.add(place.key)
                        yield place

    def _keep(self, wanted: list[Names], memory: int | None) -> None:
        adapters = self._adapters
        names = {name for names in (*wanted, *self._selections) for name in names}
        with adapters.changing(names):
            plan = self._plan(wanted, math.inf if memory is None else memory)
            self._drop_all_but({place.key for place in (*plan.chosen, *plan.twins)})
            self._selections, self._memory, self._left = wanted, memory, plan.left
        # Calls go on, and no other change is made.
        with adapters.changing(()):
            copies = _made(plan)
        with adapters.changing(names):
            for place, copy in copies.items():
                self._put(place, copy)

    def _plan(self, wanted: list[Names], memory: float) -> _Plan:
        plan = _Plan(memory)
        first: dict[frozenset[int], _Place] = {}
        for place in self._places(wanted):
            reason = obstacle(place.layer, place.names)
            if reason is not None:
                plan.left[place.key] = reason
            elif place.may_share(first.get(place.tensors)):
                plan.twins[place] = first[place.tensors]
            elif plan.takes(place):
                plan.chosen.append(place)
                first.setdefault(place.tensors, place)
        return plan

    def _drop_all_but(self, keys: Collection[tuple[str, Names]]) -> None:
        for site_id, layer in self._adapters.layers.items():
            if isinstance(layer, AdaptedLayer):
                layer.drop_copies(lambda names, site_id=site_id: (site_id, names) not in keys)  # type: ignore[misc]

    def _put(self, place: _Place, copy: MergedCopy) -> None:
        """Let a layer keep its copy, unless something has changed since."""
        stands = self._adapters.layers.get(place.site_id) is place.layer
        if stands and copy.is_current(place.layer, place.names):
            place.layer.keep_copy(place.names, copy)
        elif not place.layer.merged_copies:
            unwatch_base(*copy.base)

    def rename(self, old: str, new: str) -> None:
        """Follow an adapter that has got another name."""

        def renamed(names: Names) -> Names:
            return tuple(new if name == old else name for name in names)

        self._selections = [renamed(names) for names in self._selections]
        self._left = {(site_id, renamed(names)): reason for (site_id, names), reason in self._left.items()}

    # -- the report ----------------------------------------------------------------------------------------

    def report(self) -> MergedCopiesReport | None:
        """Return what is kept now; ``None`` where nothing was asked for."""
        present = self._adapters.by_name
        selections = [names for names in self._selections if all(name in present for name in names)]
        if not selections:
            return None
        adapters = [self._adapter_report(names) for names in selections]
        return MergedCopiesReport(adapters, _nbytes(self._places(selections)), self._memory)

    def _adapter_report(self, names: Names) -> KeptAdapterReport:
        places = list(self._places([names]))
        kept = [place.site_id for place in places if place.copy is not None]
        unmerged: dict[str, list[str]] = {}
        for place in places:
            if place.site_id not in kept:
                unmerged.setdefault(self._left.get(place.key, OUT_OF_DATE), []).append(place.site_id)
        return KeptAdapterReport(names, [place.site_id for place in places], kept, _nbytes(places), unmerged)


def _made(plan: _Plan) -> dict[_Place, MergedCopy]:
    """Make the copies of a plan that are not kept already."""
    copies: dict[_Place, MergedCopy] = {}

    def make(place: _Place) -> None:
        if place.layer.here(place.names) == place.names:
            copies[place] = MergedCopy(place.layer, place.names)

    missing = [place for place in plan.chosen if place.copy is None]
    try:
        if all(is_in_memory(place.layer) for place in missing):
            for_each(make, missing)
        else:
            for place in missing:
                make(place)
        for place, first in plan.twins.items():
            if place.copy is None:
                make(place)
                _share(plan, copies, place, copies.get(first) or first.copy)
    except BaseException:
        for place in (*plan.chosen, *plan.twins):
            if not place.layer.merged_copies:
                unwatch_base(*place.layer.parameters_below(place.names))
        raise
    return copies


def _share(plan: _Plan, copies: dict[_Place, MergedCopy], place: _Place, first: MergedCopy | None) -> None:
    """Let a copy have the weight of one that is made of the same tensors; else keep it if it fits.

    The two are equal, but for the rounding where a layer has the other's weight transposed.
    """
    copy = copies.get(place)
    if copy is None:
        return
    if first is not None and _are_alike(first.weight, copy.weight):
        copy.weight = first.weight
    elif not plan.takes(place):
        del copies[place]


def _are_alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    close = 4 * torch.finfo(a.dtype).eps
    blocks = (slice(*block) for block in row_blocks(len(a), BLOCK))
    return all(torch.allclose(a[rows], b[rows], rtol=close, atol=close) for rows in blocks)


def _nbytes(places: Iterable[_Place]) -> int:
    """Return the bytes of the copies at these places; what several share counts once."""
    copies = [place.copy for place in places]
    tensors = (tensor for copy in copies if copy is not None for tensor in copy.own_tensors)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _names(names: str | Sequence[str]) -> Names:
    return (names,) if isinstance(names, str) else tuple(names)


def _size(memory: str | float | None) -> int | None:
    if memory is None:
        return None
    size = None if isinstance(memory, bool) else parse_bytes(str(memory))
    if size is None:
        raise UsageError(
            f"memory={memory!r} is no amount of memory.",
            hint='Give one such as "2GB", "500MiB" or a number of bytes; drop_merged() releases all.',
        )
    return size
