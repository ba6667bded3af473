"""The slots of a bank: without spilling, what fits depends on what is in use alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.adapters.slot_table import SlotTable, slot_capacity
from veneer.serving.slot_turns import SlotTurns

RANKS = [0, 1, 1, 4, 4, 5, 8, 9, 16, 20]
CAPACITY = slot_capacity(3, (4, 8))


class World:
    """An admission, and a bank whose leases end a while after the requests that it let through."""

    def __init__(self, *, spills: bool = False) -> None:
        self.table, self.turns = SlotTable(CAPACITY, spills=spills), SlotTurns(CAPACITY, 1.0)
        # Adapter -> its requests, and its leases in the bank; and the requests that have no lease yet.
        self.requests: Counter[object] = Counter()
        self.leases: Counter[object] = Counter()
        self.waiting: list[int] = []

    def begin(self, adapter: int) -> None:
        need = self.table.need(RANKS[adapter])
        assert need is not None
        if self.requests[adapter] or self.turns._free[need[0]] >= need[1]:
            self.turns.begin(str(adapter), *need, 0.0)
            self.requests[adapter] += 1
            self.waiting.append(adapter)
            self.lease()

    def end(self, adapter: int) -> None:
        if self.requests[adapter] and adapter not in self.waiting:
            self.requests[adapter] -= 1
            self.turns.end(str(adapter), 0.0)

    def lease(self) -> None:
        """Lease what waits, as far as the slots allow."""
        self.waiting = [adapter for adapter in self.waiting if not self.has_lease(adapter)]

    def has_lease(self, adapter: int) -> bool:
        if adapter not in self.table.residences and self.table.enter(adapter, RANKS[adapter], self.leases) is None:
            return False
        self.table.touch(adapter)
        self.leases[adapter] += 1
        return True

    def release(self) -> None:
        """End the leases of the requests that ended: all that waits must find its slots then."""
        self.leases = Counter({a: n - self.waiting.count(a) for a, n in self.requests.items()})
        self.lease()
        assert not self.waiting
        slots = Counter((home.bucket, slot) for home in self.table.residences.values() for slot in home.slots)
        assert max(slots.values(), default=1) == 1


CHANGES = st.lists(
    st.tuples(st.sampled_from(["begin", "begin", "end", "release"]), st.integers(0, len(RANKS) - 1)), max_size=80
)


@settings(max_examples=200, deadline=None)
@given(changes=CHANGES)
def test_what_admission_lets_through_finds_its_slots_whatever_lies_there(changes: list[tuple[str, int]]) -> None:
    world = World()
    for change, adapter in changes:
        if change == "release":
            world.release()
        else:
            getattr(world, change)(adapter)
    world.release()


def test_with_spilling_it_would_not() -> None:
    world, narrow, wide = World(spills=True), (1, 2, 3, 4), RANKS.index(20)
    for adapter in narrow[:3]:
        world.begin(adapter)
    world.end(narrow[0])
    world.begin(narrow[3])  # the lease of the first is not over: this one goes into the wider bucket
    world.release()
    world.begin(wide)
    with pytest.raises(AssertionError):
        world.release()
