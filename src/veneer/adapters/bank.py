"""A bank of adapters for batches whose rows use different ones, and whose adapters come and go.

    bank = model.bank(slots=64)
    lease = bank.lease("pirate")                      # copies one adapter, unless it lies in a slot already
    model(ids, adapter_names=bank.plan([(lease, 12), (None, 7)]))
    lease.release()                                   # copies nothing

Each adapted layer has memory for a number of folded adapters (``patches/slots.py``), which is written in place, one
slot at a time. A slot is given to another adapter only when nobody leases the one in it and no call reads it. What
finds none may be computed beside them, stacked anew for each batch. Which adapter lies where is worked out once for a
batch, in an object that is never changed (``SlotsInUse``).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank_plan import BankedAdapter, BankLease, BankPlan, BankStatus
from veneer.adapters.bank_slots import BankSlots
from veneer.adapters.collection import Adapters
from veneer.adapters.folding import FoldedAdapter, fold
from veneer.adapters.slot_table import slot_capacity
from veneer.errors import AdapterError, BankFullError, UnknownAdapterError, UsageError
from veneer.patches.selection import BASE, NOTHING, Selection, keep_few
from veneer.patches.watched_parameters import Edits


class AdapterBank:
    """Holds folded adapters of one model in slots, for batches whose adapters come and go. Made by ``model.bank()``.

    All methods may be called by any thread. An adapter comes into its slots as it is at the first lease; its weights
    are not to be changed while it is leased.

    Args:
        adapters: the set of adapters of the model.
        slots: the number of slots of each bucket, or a bucket's rank -> the number of its own.
        rank_buckets: the ranks of the buckets.
        spills: an adapter that its bucket leaves no room takes slots of another bucket. Without, what fits depends only
            on what is leased, and not on the order in which that came.

    Attributes:
        adapters: the set of adapters of the model.
    """

    # The slots that are moved, at most, before a batch is computed.
    MOVES = 2
    # The adapters whose folded forms are kept, at most, for a lease to come.
    AHEAD = 8

    def __init__(
        self,
        adapters: Adapters,
        slots: int | Mapping[int, int] = 32,
        rank_buckets: Sequence[int] = (8, 16, 64),
        *,
        spills: bool = True,
    ) -> None:
        self.adapters = adapters
        self._table = BankSlots(slot_capacity(slots, rank_buckets), spills=spills)
        self._lock = threading.RLock()
        self._by_version: dict[Hashable, BankedAdapter] = {}
        # The selections of the last plans, and how many changes the slots had seen.
        self._selections: dict[Any, Selection] = {}
        self._changes = 0
        # Those whose folded forms are kept.
        self._ahead: list[BankedAdapter] = []
        # The leased ones that lie in no slot.
        self._beside: dict[BankedAdapter, FoldedAdapter] = {}
        # The calls under way.
        self._calls = 0
        self._row_by_row = self._hits = 0
        self._edits, self._states = Edits.last, adapters.active_selection.layer_states

    # -- the versions --------------------------------------------------------------------------------------

    def register(self, adapter_name: str, version: Hashable = None) -> BankedAdapter:
        """Fold an adapter that is on the model, so that leases of it copy and do nothing else.

        Args:
            adapter_name: its name on the model.
            version: identifies it in the bank, such as a digest of its bytes; its name when ``None``.

        Raises:
            UnknownAdapterError: it is not on the model.
            UnsupportedError: no packed batch can hold it: prompts, gates (aLoRA), routes (X-LoRA, Arrow, Poly ...).
            AdapterError: the version is another adapter's, or it needs more slots than the bank has.
        """
        version = adapter_name if version is None else version
        adapter = self.adapters.get(adapter_name)
        with self._lock:
            present = self._registered(version, adapter)
        if present is not None:
            return present
        folded = self._fold(adapter)
        self._check_size(adapter_name, folded.rank)
        with self._lock:
            present = self._registered(version, adapter)
            if present is None:
                present = self._by_version[version] = _banked(version, adapter, folded)
                self._keep_ahead(present, folded)
            return present

    def _registered(self, version: Hashable, adapter: Adapter) -> BankedAdapter | None:
        """Return the version, if it is registered and that adapter's.

        Raises:
            AdapterError: it is another adapter's, or the adapter is there under another version.
        """
        for other in [*self._by_version]:
            self._present(other)
        present = self._by_version.get(version)
        others = (entry for entry in self._by_version.values() if entry._adapter is adapter)
        present = next(others, None) if present is None else present
        if present is None or (present.version == version and present._adapter is adapter):
            return present
        raise AdapterError(
            f"{adapter.name!r} cannot come as version {version!r}: {present.name!r} is in the bank as "
            f"{present.version!r}.",
            hint="Give each adapter on the model one version of its own.",
        )

    def prepare(self, version: Hashable) -> None:
        """Fold a version again that gave way to others, in this thread, so that the next lease of it only copies.

        Raises:
            UnknownAdapterError: there is no such version.
        """
        self._fold_ahead(self._known(version))

    def _fold_ahead(self, entry: BankedAdapter) -> None:
        """Fold an adapter without holding up the steps of other threads, unless it lies in slots or is folded."""
        with self._lock:
            lies_here = entry in self._table.residences and entry._versions.is_current(NOTHING)
            folded = entry._folded or self._beside.get(entry)
        if not lies_here and (folded is None or not folded.versions.is_current(NOTHING)):
            folded = self._fold(entry._adapter)
            with self._lock:
                self._keep_ahead(entry, folded)

    def _fold(self, adapter: Adapter) -> FoldedAdapter:
        """Fold an adapter, which is not deleted meanwhile."""
        active, call = self.adapters.active_selection, object()
        active.underway.begin(call, (adapter.name,), active.calls)
        try:
            if self.adapters.get(adapter.name) is not adapter:
                raise _replaced(adapter.name)
            return fold(self.adapters, adapter)
        finally:
            active.underway.end(call)

    def _keep_ahead(self, entry: BankedAdapter, folded: FoldedAdapter) -> None:
        """Keep a folded form for the next lease, and those of the last few others."""
        entry._folded = folded
        ahead = [other for other in self._ahead if other._folded is not None and other is not entry]
        for other in ahead[: -self.AHEAD + 1]:
            other._folded = None
        self._ahead = [*ahead[-self.AHEAD + 1 :], entry]

    def remove(self, version: Hashable) -> None:
        """Forget a version, which stays on the model.

        Raises:
            AdapterError: it is leased, or a call that uses it is under way.
        """
        with self._lock:
            entry = self._get(version)
            if entry.leases or entry._readers:
                raise AdapterError(
                    f"Version {version!r} is leased {entry.leases} times.", hint="Release its leases first."
                )
            self._forget(entry)

    def __contains__(self, version: object) -> bool:
        """Tell whether a version is registered, and its adapter still on the model."""
        with self._lock:
            return self._present(version) is not None

    def _present(self, version: Any) -> BankedAdapter | None:
        """Return a version; one whose adapter is not on the model any more is forgotten."""
        entry = self._by_version.get(version)
        if entry is not None and self.adapters.by_name.get(entry.name) is not entry._adapter:
            self._forget(entry)
            return None
        return entry

    def _get(self, version: Hashable) -> BankedAdapter:
        entry = self._by_version.get(version)
        if entry is None:
            raise UnknownAdapterError(
                f"The bank has no version {version!r}.", hint="bank.register(adapter_name, version) adds it."
            )
        return entry

    def _forget(self, entry: BankedAdapter) -> None:
        self._table.leave(entry)
        entry._folded = None
        del self._by_version[entry.version]
        self._selections = {}  # they hold its layers

    def _check_size(self, name: str, rank: int) -> None:
        if self._table.need(rank) is None:
            raise AdapterError(
                f"{name!r} has the rank {rank}, and no bucket of the bank has slots for so much: "
                f"{_shown(self._table.capacity)}.",
                hint=f"model.bank(slots=..., rank_buckets=(..., {rank})) has.",
            )

    # -- leases --------------------------------------------------------------------------------------------

    def lease(self, version: Hashable, *, needs_slots: bool = True) -> BankLease:
        """Keep a version in its slots until the lease is released; it is copied there if it is in none.

        Args:
            version: as registered; or the name of an adapter on the model, which is registered under it.
            needs_slots: with False, an adapter for which no slot is free is computed without, at some more cost, until
                a batch finds one free.

        Raises:
            BankFullError: the adapters that are leased leave no slot.
            UnknownAdapterError: there is no such version.
        """
        entry = self._known(version)
        lease, underway = BankLease(self, entry), self.adapters.active_selection.underway
        underway.lease(lease, entry.name)
        try:
            self._fold_ahead(entry)
            with self._lock:
                if self._present(version) is not entry:
                    raise _replaced(entry.name)
                self._refresh()
                lies_here = self._bring_in(entry)
                if needs_slots and not lies_here:
                    self._forget_beside(entry)
                    raise self._full(entry)
                entry.leases += 1
        except BaseException:
            underway.end(lease)
            raise
        return lease

    def _known(self, version: Hashable) -> BankedAdapter:
        with self._lock:
            entry = self._present(version)
        if entry is None and version in self.adapters.by_name:
            entry = self.register(str(version))
        return self._get(version) if entry is None else entry

    def release(self, lease: BankLease) -> None:
        """End a lease, as its own ``release()`` does."""
        with self._lock:
            if not lease._is_active:
                return
            lease._is_active = False
            lease.adapter.leases -= 1
            self._forget_beside(lease.adapter)
            self._table.touch(lease.adapter)
        self.adapters.active_selection.underway.end(lease)

    # -- slots ---------------------------------------------------------------------------------------------

    def _bring_in(self, entry: BankedAdapter) -> bool:
        """Write an adapter into slots, unless it lies in some as it is now; return False where none are free."""
        if entry in self._table.residences and entry._versions.is_current(NOTHING):
            self._table.touch(entry)
            self._hits += 1
            return True
        return self._write(entry, self._in_use())

    def _write(self, entry: BankedAdapter, in_use: Mapping[object, int]) -> bool:
        folded = self._folded(entry)
        lies_here = self._table.bring_in(entry, folded, in_use)
        if lies_here:
            self._beside.pop(entry, None)
        else:
            self._beside[entry] = folded
        return lies_here

    def _forget_beside(self, entry: BankedAdapter) -> None:
        """Drop the form that an adapter without slots is computed with, unless it is leased."""
        if not entry.leases:
            self._beside.pop(entry, None)

    def _folded(self, entry: BankedAdapter) -> FoldedAdapter:
        """Return the folded form of an adapter as it is now, which is not kept any longer."""
        folded, entry._folded = entry._folded or self._beside.get(entry), None
        if folded is None or not folded.versions.is_current(NOTHING):
            folded = fold(self.adapters, entry._adapter)
            self._check_size(entry.name, folded.rank)
            if folded.rank != entry.rank:
                self._table.leave(entry)
            entry.rank, entry.nbytes, entry._versions = folded.rank, folded.nbytes, folded.versions
            entry.row_by_row, entry._unfolded = tuple(folded.row_by_row), tuple(folded.row_by_row.values())
        return folded

    def _in_use(self) -> dict[object, int]:
        """Return how often each adapter is leased or read."""
        return {entry: entry.leases + entry._readers for entry in self._by_version.values()}

    def _full(self, entry: BankedAdapter) -> BankFullError:
        leased = sum(1 for count in self._in_use().values() if count)
        return BankFullError(
            f"No slot is free for {entry.name!r} of rank {entry.rank}: {leased} adapters are leased, and the bank has "
            f"{_shown(self._table.capacity)}.",
            hint="Release leases, or make the bank with more slots: model.bank(slots=...).",
        )

    def _refresh(self) -> None:
        """Write what is leased anew where layers or weights may have changed; what is not leaves its slots."""
        edits, states = Edits.last, self.adapters.active_selection.layer_states
        if self._edits is edits and self._states is states:
            return
        if self._states is not states:  # moved to another device, or of another dtype, among others
            self._table.layers = {}
        in_use = self._in_use()
        for entry in [*self._by_version.values()]:
            entry._folded = None
            if in_use[entry]:
                self._write(entry, in_use)
            else:
                self._table.leave(entry)
        self._selections = {}
        # Not before all is well: what failed is tried again.
        self._edits, self._states = edits, states

    # -- batches -------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[BankLease | tuple[BankLease | None, int] | None]) -> BankPlan:
        """Return the plan of a batch, to be given to the model as ``adapter_names=``.

        Args:
            rows: a lease for each row of the batch, ``None`` for the base; or, for sequences that are packed into one
                row, ``(lease, tokens)`` for each of them.

        Raises:
            AdapterError: a lease was released, or is another bank's.
        """
        leases, counts = _parts(rows)
        for lease in leases:
            self._check(lease)
        return BankPlan(self, leases, counts)

    def _check(self, lease: BankLease | None) -> None:
        if lease is None:
            return
        if not isinstance(lease, BankLease):
            raise UsageError(f"A plan holds {lease!r}.", hint="Give leases: bank.lease(name); None is the base.")
        if lease.bank is not self or not lease.is_active:
            why = "was released" if lease.bank is self else "is another bank's"
            raise AdapterError(f"The lease of {lease.version!r} {why}.", hint="Lease it again: bank.lease(version).")

    @contextmanager
    def reading(self, plan: BankPlan) -> Iterator[Selection]:
        """Give the selection of a plan inside a ``with`` block, in which its slots stay as they are."""
        entries = {lease.adapter: None for lease in plan.leases if lease is not None}
        with self._lock:
            for lease in plan.leases:
                self._check(lease)
            self._refresh()
            selection = self._selection(plan, entries)
            for entry in entries:
                entry._readers += 1
            self._calls += 1
            self._count_rows(plan)
        try:
            yield selection
        finally:
            with self._lock:
                self._calls -= 1
                for entry in entries:
                    entry._readers -= 1

    def _selection(self, plan: BankPlan, entries: Mapping[BankedAdapter, None]) -> Selection:
        """Return the selection of a plan; the last ones are kept while no slot changes."""
        rows, table = tuple(BASE if lease is None else lease.adapter.name for lease in plan.leases), self._table
        if self._changes != table.changes:
            self._changes, self._selections = table.changes, {}
        known = self._selections.get((rows, plan.counts))
        if known is not None:
            return known
        in_use = self._in_use()
        for entry in [entry for entry in entries if entry not in table.residences][: self.MOVES]:
            self._write(entry, in_use)
        moved = not self._calls and table.move_together(in_use, self.MOVES)
        selection = Selection((), rows, counts=plan.counts, slots=table.in_use(entries, self._beside))
        if not moved:  # else more may have to be
            keep_few(self._selections, (rows, plan.counts), selection)
        return selection

    def _count_rows(self, plan: BankPlan) -> None:
        counts = plan.counts or (1,) * len(plan.leases)
        self._row_by_row += sum(
            count
            for lease, count in zip(plan.leases, counts, strict=True)
            if lease is not None and (lease.adapter.row_by_row or lease.adapter in self._beside)
        )

    def need(self, version: Hashable) -> tuple[int, int]:
        """Return the rank of a version's bucket, and how many of the slots there it takes."""
        with self._lock:
            entry = self._get(version)
        need = self._table.need(entry.rank)
        assert need is not None, "checked when it was registered"
        return need

    # -- the state -----------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """The numbers of :meth:`status` that only grow, by name; never waits for a thread that writes."""
        table = self._table
        return {
            "hits": self._hits,
            "writes": table.writes,
            "bytes_written": table.bytes_written,
            "evictions": table.evictions,
            "moves": table.moves,
            "row_by_row": self._row_by_row,
        }

    @property
    def folded_bytes(self) -> int:
        """The memory of the folded forms that are kept for leases to come, and of leased adapters in no slot."""
        return sum(entry.nbytes for entry in [*self._ahead] if entry._folded is not None) + sum(
            folded.nbytes for folded in [*self._beside.values()]
        )

    @property
    def nbytes(self) -> int:
        """The memory of all slots that were made, which the system gives as they are written to."""
        return self._table.nbytes

    def status(self) -> BankStatus:
        """Return the state of the bank."""
        with self._lock:
            table, entries = self._table, tuple(self._by_version.values())
            return BankStatus(
                slots=dict(table.capacity),
                used={bucket: table.used(bucket) for bucket in table.capacity},
                adapters=entries,
                resident=tuple(entry.version for entry in entries if entry in table.residences),
                leases=sum(entry.leases for entry in entries),
                nbytes=self.nbytes,
                **self.counters,
            )

    def __repr__(self) -> str:
        status = self.status()
        return f"AdapterBank({len(status.resident)} of {len(status.adapters)} adapters in {_shown(status.slots)})"


def _replaced(name: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"{name!r} was deleted or replaced meanwhile.", hint="Register what is there now.")


def _banked(version: Hashable, adapter: Adapter, folded: FoldedAdapter) -> BankedAdapter:
    return BankedAdapter(
        version,
        adapter.name,
        folded.rank,
        folded.nbytes,
        tuple(folded.row_by_row),
        _adapter=adapter,
        _folded=folded,
        _versions=folded.versions,
        _unfolded=tuple(folded.row_by_row.values()),
    )


def _shown(capacity: Mapping[int, int]) -> str:
    return ", ".join(f"{slots} slots of rank {bucket}" for bucket, slots in capacity.items() if bucket)


def _parts(rows: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...] | None]:
    """Return the leases of a plan's rows, and the tokens of each where it is for a packed row."""
    if not any(isinstance(row, tuple) for row in rows):
        return tuple(rows), None
    for row in rows:
        if not isinstance(row, tuple) or len(row) != 2 or not isinstance(row[1], int) or row[1] < 1:
            raise UsageError(
                f"A plan holds {row!r}, and elsewhere parts of a packed row.",
                hint="Give a lease for each row, or (lease, tokens) for each part.",
            )
    return tuple(lease for lease, _ in rows), tuple(tokens for _, tokens in rows)
