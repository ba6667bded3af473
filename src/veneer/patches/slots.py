"""The slots of one layer: memory for the fused forms of adapters, which are written in place one at a time.

For each rank bucket ``R`` there are ``down`` ``(slots, in, R)`` and ``up`` ``(slots, R, out)``, which hold zeros where
no adapter is. A batch computes with the views ``[:k]`` of the first ``k`` slots. Vectors have a row for each adapter,
and a neutral last row for the base. An adapter of a rank above its bucket's takes several slots, whose products add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from veneer.patches.fused import FusedPatch
from veneer.patches.mixed_batch import NEUTRAL, StackedFactors, StackedPatches, stack


@dataclass(frozen=True)
class UsedSlots:
    """The slots of one bucket that a batch uses for one part of each adapter.

    Attributes:
        bucket: its rank.
        part: the number of the part; adapters of a higher rank than the bucket's have several.
        names: the adapter in each slot up to the last that is used; ``None`` in a slot that is not.
        bits: a number with the bit of each slot that is.
    """

    bucket: int
    part: int
    names: tuple[str | None, ...]
    bits: int


@dataclass(frozen=True)
class SlotsInUse:
    """The slots that one batch uses, on all layers; it is never changed.

    Attributes:
        slots: for each bucket, and each part of the adapters in it.
        places: adapter's name -> its row in the vectors.
        bits: a number with the bit of each such row.
        layers: the id of a layer's site -> its slots.
        row_by_row: a layer -> the adapters of the batch that it computes row by row.
        beside: an adapter that lies in no slot -> the id of a layer's site -> its fused form there.
    """

    slots: Sequence[UsedSlots]
    places: Mapping[str, int]
    bits: int
    layers: Mapping[str, LayerSlots]
    row_by_row: Mapping[object, tuple[str, ...]]
    beside: Mapping[str, Mapping[str, FusedPatch]] = field(default_factory=dict)
    _stacked: dict[object, StackedPatches | None] = field(default_factory=dict, repr=False)

    def stacked(self, layer: Any) -> StackedPatches | None:
        """Return the stacked adapters of a layer; ``None`` where none of the batch's is there."""
        if layer not in self._stacked:
            own = self.layers.get(layer.site.id)
            stacked = None if own is None else own.stacked(self)
            self._stacked[layer] = self._with_beside(stacked, layer.site.id)
        return self._stacked[layer]

    def _with_beside(self, stacked: StackedPatches | None, site: str) -> StackedPatches | None:
        fused = {name: parts[site] for name, parts in self.beside.items() if site in parts and parts[site].only_adds}
        if not fused:
            return stacked
        stacked = stacked or StackedPatches("vectors", self.places)
        return replace(stacked, factors=(*stacked.factors, *stack(fused).factors))

    def rest(self, layer: object) -> tuple[str, ...]:
        """Return the adapters that a layer computes row by row."""
        return self.row_by_row.get(layer, ())


class LayerSlots:
    """Holds the fused forms of adapters on one layer.

    Args:
        capacity: a bucket's rank -> the number of its slots.
    """

    def __init__(self, capacity: Mapping[int, int]) -> None:
        self._capacity = capacity
        self._places = sum(capacity.values())
        # A bucket's rank -> A and B; made with the first adapter that needs them.
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        self._vectors: dict[str, Tensor] = {}
        # The slots, and the rows of vectors, that are not as they were made, as bits of a number.
        self._written: dict[int, int] = dict.fromkeys(capacity, 0)
        self._set: dict[str, int] = dict.fromkeys(NEUTRAL, 0)

    @property
    def nbytes(self) -> int:
        """The memory that it takes, once all of it was written to."""
        factors = (tensor for pair in self._factors.values() for tensor in pair)
        return sum(tensor.nbytes for tensor in (*factors, *self._vectors.values()))

    def write(self, bucket: int, slots: Sequence[int], place: int, fused: FusedPatch | None) -> int:
        """Write an adapter into its slots, and return the bytes written; ``None`` for one that is not on the layer."""
        for part, slot in enumerate(slots if bucket else ()):
            self._write_factors(bucket, slot, *_part(fused, part * bucket, (part + 1) * bucket))
        for name in NEUTRAL:
            self._write_vector(name, place, None if fused is None else getattr(fused, name))
        return 0 if fused is None else fused.nbytes

    def _write_factors(self, bucket: int, slot: int, down: Tensor | None, up: Tensor | None) -> None:
        bit = 1 << slot
        if down is None or up is None:
            if self._written[bucket] & bit:
                for tensor in self._factors[bucket]:
                    tensor[slot].zero_()
                self._written[bucket] &= ~bit
            return
        if bucket not in self._factors or not _are_alike(self._factors[bucket][0], down):
            count = self._capacity[bucket]
            self._factors[bucket] = (
                down.new_zeros(count, down.shape[0], bucket),
                up.new_zeros(count, bucket, up.shape[1]),
            )
        own_down, own_up = self._factors[bucket]
        rank = down.shape[1]
        own_down[slot, :, :rank] = down
        own_up[slot, :rank] = up
        if self._written[bucket] & bit:
            own_down[slot, :, rank:] = 0
            own_up[slot, rank:] = 0
        self._written[bucket] |= bit

    def _write_vector(self, name: str, place: int, vector: Tensor | None) -> None:
        bit = 1 << place
        if vector is not None:
            if name not in self._vectors or not _are_alike(self._vectors[name], vector):
                self._vectors[name] = vector.new_full((self._places + 1, len(vector)), NEUTRAL[name])
            self._vectors[name][place] = vector
            self._set[name] |= bit
        elif self._set[name] & bit:
            self._vectors[name][place] = NEUTRAL[name]
            self._set[name] &= ~bit

    def swap(self, bucket: int, one: int, other: int) -> None:
        """Let two slots of a bucket have each other's contents."""
        written = self._written[bucket]
        bits = [written >> slot & 1 for slot in (one, other)]
        if not any(bits):
            return
        for tensor in self._factors[bucket]:
            kept = tensor[one].clone()
            tensor[one] = tensor[other]
            tensor[other] = kept
        if bits[0] != bits[1]:
            self._written[bucket] = written ^ (1 << one | 1 << other)

    def stacked(self, used: SlotsInUse) -> StackedPatches | None:
        """Return the stacked adapters of a batch; ``None`` where none of them is here."""
        factors = tuple(
            StackedFactors((slots.bucket, slots.part), slots.names, *self._first(slots.bucket, len(slots.names)))
            for slots in used.slots
            if slots.bits & self._written[slots.bucket]
        )
        vectors = {name: self._vectors[name] for name in NEUTRAL if used.bits & self._set[name]}
        if not factors and not vectors:
            return None
        return StackedPatches("vectors", used.places, factors, **vectors)

    def _first(self, bucket: int, count: int) -> tuple[Tensor, Tensor]:
        down, up = self._factors[bucket]
        return down[:count], up[:count]


def _part(fused: FusedPatch | None, low: int, high: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors of the ranks from ``low`` on and below ``high``; ``None`` where there are none."""
    if fused is None or fused.down is None or fused.up is None or fused.down.shape[1] <= low:
        return None, None
    return fused.down[:, low:high], fused.up[low:high]


def _are_alike(own: Tensor, other: Tensor) -> bool:
    """Tell whether tensors are of one dtype and device, as they are unless a model without adapters was moved."""
    return own.dtype is other.dtype and own.device == other.device
