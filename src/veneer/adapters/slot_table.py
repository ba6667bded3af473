"""The slots of a bank: which adapter lies where, and which one gives way to a new one. Knows no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

from veneer.errors import UsageError


@dataclass
class Residence:
    """The place of one adapter in a bank.

    Attributes:
        bucket: the rank of its bucket; 0 for an adapter of vectors alone.
        slots: its slots there, one for each part.
        place: its row in the vectors.
    """

    bucket: int
    slots: list[int]
    place: int


# A batch computes with all slots up to the last in use. While these are fewer than so many times those in use, a move
# costs more than it saves before others come and go.
_SPREAD = 1.5


class SlotTable:
    """Assigns slots to tenants; those that nobody uses give way, those unused for longest first.

    Args:
        capacity: a bucket's rank -> the number of its slots.
        spills: a tenant that its bucket leaves no room takes slots of another bucket.

    Attributes:
        residences: tenant -> its place.
    """

    def __init__(self, capacity: Mapping[int, int], *, spills: bool = True) -> None:
        self.capacity, self._spills = dict(capacity), spills
        # In the order in which they were used last.
        self.residences: dict[object, Residence] = {}
        self._tenants: dict[int, list[object]] = {bucket: [None] * slots for bucket, slots in capacity.items()}
        self._places: list[object] = [None] * sum(capacity.values())

    def parts(self, rank: int, bucket: int) -> int:
        """Return the number of slots that an adapter takes in a bucket."""
        return max(1, -(-rank // bucket)) if bucket else 1

    def need(self, rank: int) -> tuple[int, int] | None:
        """Return the bucket of an adapter, and the slots that it takes there; ``None`` where no bucket has so many."""
        return next(self._choices(rank), None)

    def _choices(self, rank: int) -> Iterator[tuple[int, int]]:
        """Yield the buckets that can hold an adapter and the slots that it takes there, the best bucket first."""
        buckets = sorted(bucket for bucket in self.capacity if bool(bucket) or not rank)
        wide = [bucket for bucket in buckets if bucket >= rank] or buckets[-1:]
        for bucket in (*wide, *(bucket for bucket in reversed(buckets) if bucket not in wide and bucket)):
            parts = self.parts(rank, bucket)
            if parts <= self.capacity[bucket]:
                yield bucket, parts

    def enter(self, tenant: object, rank: int, in_use: Mapping[object, int]) -> Residence | None:
        """Give a new tenant its slots, the lowest that are free; ``None`` where those in use leave no room.

        Args:
            tenant: not here yet.
            rank: of its products.
            in_use: the tenants that have to stay, those whose number is not zero.
        """
        for bucket, parts in islice(self._choices(rank), None if self._spills else 1):
            if self._make_room(bucket, parts, in_use):
                tenants = self._tenants[bucket]
                slots = [slot for slot, other in enumerate(tenants) if other is None][:parts]
                place = self._places.index(None)
                for slot in slots:
                    tenants[slot] = tenant
                self._places[place] = tenant
                self.residences[tenant] = residence = Residence(bucket, slots, place)
                return residence
        return None

    def _make_room(self, bucket: int, parts: int, in_use: Mapping[object, int]) -> bool:
        """Let tenants of a bucket give way until so many slots are free; none where that cannot be."""
        idle = [t for t, home in self.residences.items() if home.bucket == bucket and not in_use.get(t)]
        free = self._tenants[bucket].count(None)
        if free + sum(len(self.residences[tenant].slots) for tenant in idle) < parts:
            return False
        for tenant in idle:
            if self._tenants[bucket].count(None) >= parts:
                break
            self.leave(tenant)
        return True

    def leave(self, tenant: object) -> None:
        """Free a tenant's slots, if it has any."""
        home = self.residences.pop(tenant, None)
        if home is not None:
            for slot in home.slots:
                self._tenants[home.bucket][slot] = None
            self._places[home.place] = None

    def touch(self, tenant: object) -> None:
        """Note that a tenant is used now, if it is here."""
        if tenant in self.residences:
            self.residences[tenant] = self.residences.pop(tenant)

    def used(self, bucket: int) -> int:
        """Return the number of a bucket's slots that hold something."""
        slots = self._tenants[bucket]
        return len(slots) - slots.count(None)

    def exchanges(self, in_use: Mapping[object, int], most: int) -> Iterator[tuple[int, int, int]]:
        """Let tenants in use come to lie in the first slots: yield bucket and two slots that change their contents.

        Nothing moves where there is little to gain.

        Args:
            in_use: tenant -> a number that is not zero for one that is in use.
            most: the number of moves that may be made now.
        """
        moves = count()
        for bucket, tenants in self._tenants.items():
            used = [slot for slot, tenant in enumerate(tenants) if in_use.get(tenant)]
            holes = (slot for slot in range(len(used)) if not in_use.get(tenants[slot]))
            for hole, slot in zip(holes, reversed(used), strict=False):
                if slot <= hole or slot < _SPREAD * len(used) or not bucket or next(moves) >= most:
                    break
                self._exchange(bucket, hole, slot)
                yield bucket, hole, slot

    def _exchange(self, bucket: int, first: int, second: int) -> None:
        tenants = self._tenants[bucket]
        homes = {id(t): self.residences[t] for t in (tenants[first], tenants[second]) if t is not None}
        swapped = {first: second, second: first}
        for home in homes.values():
            home.slots = [swapped.get(slot, slot) for slot in home.slots]
        tenants[first], tenants[second] = tenants[second], tenants[first]


def slot_capacity(slots: int | Mapping[int, int], rank_buckets: Sequence[int]) -> dict[int, int]:
    """Return a bucket's rank -> the number of its slots; 0 for adapters of vectors alone.

    Raises:
        UsageError: a number is not above zero, or there is none.
    """
    by_rank = dict(slots) if isinstance(slots, Mapping) else dict.fromkeys(rank_buckets, slots)
    numbers = [*by_rank.keys(), *by_rank.values()]
    if not by_rank or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise UsageError(
            f"A bank was asked for with slots={slots!r} and rank_buckets={tuple(rank_buckets)!r}.",
            hint="Both are whole numbers above zero: model.bank(slots=32, rank_buckets=(8, 16, 64)).",
        )
    return {0: max(by_rank.values()), **dict(sorted(by_rank.items()))}


def bits(numbers: Sequence[int]) -> int:
    """Return a number with the bit of each of ``numbers``."""
    return sum({1 << number for number in numbers})
