"""Decides which adapters have the slots of a batch; none waits for ever, and none comes and goes all the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.serving.fair_queue import Waiter


@dataclass
class _Holder:
    """An adapter that has slots: of which bucket, how many, since when, and for how many requests."""

    bucket: int
    slots: int
    since: float
    requests: int = 0
    closed: bool = False


class SlotTurns:
    """Counts the requests of the adapters that have slots; the base needs none.

    An adapter that waits for longer than the cycle makes those of its bucket that have had their slots for longest run
    out: they get no new requests, and lose the slots with their last ones. What comes free is kept for it.

    Args:
        capacity: a bucket's rank -> the number of its slots.
        cycle: in seconds.
    """

    def __init__(self, capacity: Mapping[int, int], cycle: float) -> None:
        self._cycle = cycle
        self._holders: dict[str, _Holder] = {}
        self._free = Counter(capacity)
        # Adapter -> when it lost its slots; of those that wait.
        self._lost: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def begin(self, adapter: str, bucket: int, slots: int, now: float) -> None:
        """Count a request that begins."""
        if adapter not in self._holders:
            self._holders[adapter] = _Holder(bucket, slots, now)
            self._free[bucket] -= slots
        self._holders[adapter].requests += 1

    def end(self, adapter: str, now: float) -> None:
        """Count a request no more; the slots are free after the last."""
        holder = self._holders[adapter]
        holder.requests -= 1
        if not holder.requests:
            del self._holders[adapter]
            self._free[holder.bucket] += holder.slots
            self._lost[adapter] = now

    def next(self, heads: Sequence[Waiter], now: float) -> Waiter | None:
        """Return the first of the requests that slots are there for; one that waits for too long comes first."""
        first: dict[int, Waiter] = {}
        for waiter in sorted(self._starving(heads, now), key=self._waits_since):
            first.setdefault(waiter.bucket, waiter)
        return next((w for w in heads if self._has_slots(w) or self._may_have(w, first.get(w.bucket, w))), None)

    def make_way(self, heads: Sequence[Waiter], now: float) -> bool:
        """Close as many adapters as others wait for too long; tell whether any wait for slots."""
        waiting = {waiter.adapter for waiter in heads if self._needs_slots(waiter)}
        self._lost = {adapter: moment for adapter, moment in self._lost.items() if adapter in waiting}
        starving = {waiter.adapter: waiter for waiter in self._starving(heads, now)}.values()
        for bucket in self._free:
            self._close(bucket, sum(waiter.slots for waiter in starving if waiter.bucket == bucket), now)
        return bool(waiting)

    def _close(self, bucket: int, wanted: int, now: float) -> None:
        """Close those that have slots of a bucket for longest, until so many come free; none where none are wanted."""
        holders = [holder for holder in self._holders.values() if holder.bucket == bucket]
        for holder in holders:
            holder.closed &= wanted > 0
        short = wanted - self._free[bucket] - sum(holder.slots for holder in holders if holder.closed)
        for holder in sorted(holders, key=lambda holder: holder.since):
            if short > 0 and not holder.closed and now - holder.since >= self._cycle:
                holder.closed = True
                short -= holder.slots

    def _has_slots(self, waiter: Waiter) -> bool:
        holder = self._holders.get(waiter.adapter or "")
        return waiter.adapter is None or (holder is not None and not holder.closed)

    def _may_have(self, waiter: Waiter, first: Waiter) -> bool:
        """Tell whether a request may have free slots, of which ``first`` must get its own."""
        return (
            self._needs_slots(waiter) and waiter.adapter == first.adapter and waiter.slots <= self._free[waiter.bucket]
        )

    def _needs_slots(self, waiter: Waiter) -> bool:
        return waiter.adapter is not None and waiter.adapter not in self._holders

    def _waits_since(self, waiter: Waiter) -> float:
        return max(waiter.arrival, self._lost.get(waiter.adapter or "", waiter.arrival))

    def _starving(self, heads: Sequence[Waiter], now: float) -> list[Waiter]:
        return [w for w in heads if self._needs_slots(w) and now - self._waits_since(w) >= self._cycle]
