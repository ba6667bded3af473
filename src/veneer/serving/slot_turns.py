"""Decides which adapters have the slots of a batch; none waits for ever, and none comes and goes all the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from veneer.serving.fair_queue import Waiter


class SlotTurns:
    """Counts the requests of the adapters that have slots; the base needs none.

    An adapter that waits for longer than the cycle makes the one that has had its slot for longest run out: it gets no
    new requests, and loses the slot with its last one.
    """

    def __init__(self, slots: int, cycle: float) -> None:
        self._slots, self._cycle = slots, cycle
        # Adapter -> since when it has its slot.
        self._since: dict[str, float] = {}
        self._requests: Counter[str] = Counter()
        self._closed: set[str] = set()
        # Adapter -> when it lost its slot; of those that wait.
        self._lost: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def begin(self, adapter: str, now: float) -> None:
        """Count a request that begins."""
        self._since.setdefault(adapter, now)
        self._requests[adapter] += 1

    def end(self, adapter: str, now: float) -> None:
        """Count a request no more; the slot is free after the last."""
        self._requests[adapter] -= 1
        if not self._requests[adapter]:
            del self._requests[adapter], self._since[adapter]
            self._closed.discard(adapter)
            self._lost[adapter] = now

    def next(self, heads: Sequence[Waiter], now: float) -> Waiter | None:
        """Return the first of the requests that a slot is there for; one that waits for too long comes first."""
        starving = self._starving(heads, now)
        first = min(starving, key=self._waits_since).adapter if starving else None
        is_free = len(self._since) < self._slots
        return next((w for w in heads if self._has_slot(w) or (is_free and first in (None, w.adapter))), None)

    def make_way(self, heads: Sequence[Waiter], now: float) -> bool:
        """Close as many adapters as others wait for too long; tell whether any wait for a slot."""
        waiting = {waiter.adapter for waiter in heads if self._needs_slot(waiter)}
        self._lost = {adapter: moment for adapter, moment in self._lost.items() if adapter in waiting}
        starving = {waiter.adapter for waiter in self._starving(heads, now)}
        wanted = len(starving) - (self._slots - len(self._since)) - len(self._closed)
        old = [a for a, since in self._since.items() if now - since >= self._cycle and a not in self._closed]
        self._closed.update(sorted(old, key=self._since.__getitem__)[: max(0, wanted)])
        return bool(waiting)

    def _has_slot(self, waiter: Waiter) -> bool:
        adapter = waiter.adapter
        return adapter is None or (adapter in self._since and adapter not in self._closed)

    def _needs_slot(self, waiter: Waiter) -> bool:
        return waiter.adapter is not None and waiter.adapter not in self._since

    def _waits_since(self, waiter: Waiter) -> float:
        return max(waiter.arrival, self._lost.get(waiter.adapter or "", waiter.arrival))

    def _starving(self, heads: Sequence[Waiter], now: float) -> list[Waiter]:
        return [w for w in heads if self._needs_slot(w) and now - self._waits_since(w) >= self._cycle]
