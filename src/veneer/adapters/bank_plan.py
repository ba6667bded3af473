"""What a bank of adapters gives out: leases, plans of batches, and its state. None of them knows where a slot lies."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from veneer.adapters.adapter import Adapter
from veneer.adapters.folding import FoldedAdapter, FoldedVersions
from veneer.patches.selection import BASE, Selection


class Bank(Protocol):
    """The bank that leases and plans are of: an ``AdapterBank``."""

    @property
    def adapters(self) -> Any:
        """The set of adapters of the model."""

    def release(self, lease: BankLease) -> None:
        """End a lease."""

    def reading(self, plan: BankPlan) -> AbstractContextManager[Selection]:
        """Give the selection of a plan inside a ``with`` block, in which its slots stay as they are."""


@dataclass(eq=False)
class BankedAdapter:
    """Describes one version of an adapter in a bank.

    Attributes:
        version: identifies it in the bank.
        name: its name on the model.
        rank: the highest rank of a layer's products; 0 for an adapter of vectors alone.
        nbytes: the memory of its folded form.
        row_by_row: the modules that compute its rows one adapter after the other, by name.
        leases: how many leases of it there are.
    """

    version: Hashable
    name: str
    rank: int
    nbytes: int
    row_by_row: tuple[str, ...]
    leases: int = 0
    _adapter: Adapter = field(repr=False, kw_only=True)
    _folded: FoldedAdapter | None = field(repr=False, kw_only=True)
    _versions: FoldedVersions = field(repr=False, kw_only=True)
    _unfolded: tuple[object, ...] = field(repr=False, kw_only=True)
    # The calls under way that read its slots.
    _readers: int = field(default=0, repr=False, kw_only=True)


class BankLease:
    """Keeps an adapter in its slots of a bank until it is released; a ``with`` block releases it too.

    Attributes:
        adapter: the adapter.
    """

    def __init__(self, bank: Bank, adapter: BankedAdapter) -> None:
        self.bank = bank
        self.adapter = adapter
        self._is_active = True

    @property
    def version(self) -> Hashable:
        """The version that is leased."""
        return self.adapter.version

    @property
    def is_active(self) -> bool:
        """True until the lease is released."""
        return self._is_active

    def release(self) -> None:
        """End the lease; the adapter stays in its slots until another needs them. Nothing happens the second time."""
        self.bank.release(self)

    def __enter__(self) -> BankLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"BankLease({self.version!r}, is_active={self.is_active})"


@dataclass(frozen=True)
class BankPlan:
    """Says which leased adapter computes each row of one batch, or each part of a packed row. It is never changed.

    Made by :meth:`AdapterBank.plan`, and given to the model as ``adapter_names=``, as often as its leases hold.

    Attributes:
        bank: the bank.
        leases: a lease for each row or part; ``None`` for the base.
        counts: the tokens of each part, where the sequences are packed into one row.
    """

    bank: Bank
    leases: tuple[BankLease | None, ...]
    counts: tuple[int, ...] | None = None

    @property
    def versions(self) -> tuple[Hashable, ...]:
        """The version of each row or part; ``None`` for the base."""
        return tuple(None if lease is None else lease.version for lease in self.leases)

    @property
    def names(self) -> list[Any]:
        """The same as names of adapters on the model, as ``adapter_names=`` takes them."""
        names = [BASE if lease is None else lease.adapter.name for lease in self.leases]
        return names if self.counts is None else list(zip(names, self.counts, strict=True))


@dataclass(frozen=True)
class BankStatus:
    """The state of a bank at one moment.

    Attributes:
        slots: a bucket's rank -> the number of its slots; 0 for adapters of vectors alone.
        used: a bucket's rank -> how many of them hold an adapter, or a part of one.
        adapters: the adapters that are registered.
        resident: the versions that lie in slots.
        leases: how many leases there are.
        nbytes: the memory of all slots that were made, which the system gives as they are written to.
        hits: how many leases found their adapter in slots.
        writes: how many times an adapter was written into slots.
        bytes_written: the bytes that this took.
        evictions: how many times an adapter gave way to another.
        moves: how many times a slot's contents were moved, where those in use lay far apart.
        row_by_row: how many rows, or tokens, were computed of adapters that lie in no slot, or have modules that
            compute them row by row.
    """

    slots: Mapping[int, int]
    used: Mapping[int, int]
    adapters: tuple[BankedAdapter, ...]
    resident: tuple[Hashable, ...]
    leases: int
    nbytes: int
    hits: int
    writes: int
    bytes_written: int
    evictions: int
    moves: int
    row_by_row: int
