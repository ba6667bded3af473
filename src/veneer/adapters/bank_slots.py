"""The slots of a bank on all layers: adapters are written into them, moved, and read by the plan of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from veneer.adapters.bank_plan import BankedAdapter
from veneer.adapters.folding import FoldedAdapter
from veneer.adapters.slot_table import SlotTable, bits
from veneer.patches.fused import FusedPatch
from veneer.patches.slots import LayerSlots, SlotsInUse, UsedSlots


class BankSlots(SlotTable):
    """Holds the memory of a bank's slots. It has no lock of its own.

    Args:
        capacity: a bucket's rank -> the number of its slots.
        spills: an adapter that its bucket leaves no room takes slots of another bucket.

    Attributes:
        layers: the id of a layer's site -> its slots, which stay while its wrapper goes and comes again.
        changes: grows whenever an adapter comes to lie elsewhere.
        writes: how many times an adapter was written.
        bytes_written: the bytes that this took.
        evictions: how many times an adapter gave way to another.
        moves: how many times two slots changed their contents.
    """

    def __init__(self, capacity: Mapping[int, int], *, spills: bool = True) -> None:
        super().__init__(capacity, spills=spills)
        self.layers: dict[str, LayerSlots] = {}
        self.changes = self.writes = self.bytes_written = self.evictions = self.moves = 0

    @property
    def nbytes(self) -> int:
        """The memory of all slots."""
        return sum(slots.nbytes for slots in [*self.layers.values()])

    def bring_in(self, entry: BankedAdapter, folded: FoldedAdapter, in_use: Mapping[object, int]) -> bool:
        """Write an adapter into its slots, or into new ones; return False where those in use leave no room."""
        if entry not in self.residences:
            before = len(self.residences)
            if self.enter(entry, folded.rank, in_use) is None:
                return False
            self.evictions += before + 1 - len(self.residences)
        try:
            self._write(entry, folded)
        except BaseException:
            self.leave(entry)  # a part of it may be missing
            raise
        return True

    def _write(self, entry: BankedAdapter, folded: FoldedAdapter) -> None:
        home = self.residences[entry]
        self.changes += 1
        # In-place writes are for inference and outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for site_id in folded.parts.keys() - self.layers.keys():
                self.layers[site_id] = LayerSlots(self.capacity)
            for site_id, slots in self.layers.items():
                slots.write(home.bucket, home.slots, home.place, folded.parts.get(site_id))
        self.writes += 1
        self.bytes_written += folded.nbytes

    def leave(self, tenant: object) -> None:
        self.changes += 1
        super().leave(tenant)

    def move_together(self, in_use: Mapping[object, int], most: int) -> bool:
        """Let the slots in use lie side by side, at most so many moves at a time; tell whether any was made.

        A batch computes with all slots up to the last that it uses.
        """
        before = self.moves
        with torch.inference_mode(False), torch.no_grad():
            for bucket, one, other in self.exchanges(in_use, most):
                for slots in self.layers.values():
                    slots.swap(bucket, one, other)
                self.moves += 1
                self.changes += 1
        return self.moves > before

    def in_use(
        self, entries: Iterable[BankedAdapter], beside: Mapping[BankedAdapter, FoldedAdapter] | None = None
    ) -> SlotsInUse:
        """Return the slots of adapters as they lie now; those that lie in none are in ``beside``."""
        parts = {entry: {} if beside is None or entry in self.residences else beside[entry].parts for entry in entries}
        homes = {entry: self.residences[entry] for entry in parts if entry in self.residences}
        by_part: dict[tuple[int, int], dict[int, str]] = {}
        for entry, home in homes.items():
            for part, slot in enumerate(home.slots):
                by_part.setdefault((home.bucket, part), {})[slot] = entry.name
        used = [
            UsedSlots(bucket, part, tuple(map(names.get, range(max(names) + 1))), bits([*names]))
            for (bucket, part), names in by_part.items()
            if bucket
        ]
        places = {entry.name: home.place for entry, home in homes.items()}
        row_by_row: dict[object, tuple[str, ...]] = {}
        for entry, own in parts.items():
            # Vectors are computed with from their slots alone.
            adapted = entry._adapter.layers.adapted if own else ()
            with_vectors = [layer for layer in adapted if _has_vectors(own.get(layer.site.id))]
            for layer in (*entry._unfolded, *with_vectors):
                row_by_row[layer] = (*row_by_row.get(layer, ()), entry.name)
        return SlotsInUse(
            used,
            places,
            bits([*places.values()]),
            {**self.layers},
            row_by_row,
            {entry.name: own for entry, own in parts.items() if own},
        )


def _has_vectors(fused: FusedPatch | None) -> bool:
    return fused is not None and not fused.only_adds
