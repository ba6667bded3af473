"""A lock between the calls of one model (its readers) and the changes of its adapters (its writers).

A call keeps the adapters that it uses until it ends: a change begins when no call that uses its adapters is under way,
and such calls begin when it has ended. A change that waits goes before calls that come later, so that a busy model can
be changed. Only calls inside others do not wait for it, for it waits for the outer ones. One change is made at a
time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from veneer.errors import AdapterError

# The adapters whose calls a change would disturb; ``None`` for every call, even of the base alone.
Concerned = Collection[str] | None


class _Change:
    """One change, waiting or being made. What it disturbs is known when no other is being made."""

    def __init__(self) -> None:
        self.names: Concerned = ()

    def concerns(self, used: Collection[str]) -> bool:
        """Tell whether it would disturb a call that uses the adapters ``used``."""
        return self.names is None or any(name in used for name in self.names)

    def take_in(self, part: _Change) -> None:
        """Concern what a part of it concerns, too."""
        self.names = None if self.names is None or part.names is None else [*self.names, *part.names]


class Underway:
    """The calls and changes that are under way on one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        # A token of each call -> the adapters that it uses.
        self._calls: dict[object, Collection[str]] = {}
        # Those of them that are leases, which may last.
        self._leases: set[object] = set()
        self._waiting: list[_Change] = []
        self._making: _Change | None = None

    # -- calls ---------------------------------------------------------------------------------------------

    def begin(self, call: object, used: Collection[str], outer: Callable[[], Collection[object]]) -> None:
        """Let a call begin, once no change stands in its way.

        Args:
            call: a token that stands for it.
            used: the adapters that it uses.
            outer: gives the tokens of the calls that it may be inside of.
        """
        # Not the condition, which is the same lock behind a method in Python.
        with self._lock:
            if self._making is not None or self._waiting:
                self._turn.wait_for(lambda: not self._is_held_off(used, outer()))
            self._calls[call] = used

    def lease(self, lease: object, adapter: str) -> None:
        """Let an adapter be leased until :meth:`end`: a change of it is then an error, for it might wait for ever."""
        self.begin(lease, (adapter,), lambda: ())
        with self._lock:
            self._leases.add(lease)

    def end(self, call: object) -> None:
        """Let a call end, or a lease."""
        with self._lock:
            del self._calls[call]
            self._leases.discard(call)
            if self._waiting:
                self._turn.notify_all()

    def _is_held_off(self, used: Collection[str], outer: Collection[object]) -> bool:
        making = self._making
        if making is not None and making.concerns(used) and making is not _MADE_HERE.get():
            return True
        return not self._are_under_way(outer) and any(change.concerns(used) for change in self._waiting)

    def _are_under_way(self, calls: Collection[object]) -> bool:
        return any(call in self._calls for call in calls)

    # -- changes -------------------------------------------------------------------------------------------

    @contextmanager
    def change(self, concerned: Callable[[], Concerned], inside: Collection[object]) -> Iterator[None]:
        """Make a change in the ``with`` block, once the calls that it concerns have ended.

        A change inside another's block is a part of that, which then concerns its adapters too.

        Args:
            concerned: gives the names of the adapters whose calls it would disturb; asked again after each wait.
            inside: the tokens of the calls of this context.

        Raises:
            AdapterError: a call of this context, which cannot be waited for here, is one of those.
        """
        outer, change = _MADE_HERE.get(), _Change()
        if outer is not None and self._making is outer:
            self._await_turn(change, concerned, inside, outer)
            yield
            return
        self._await_turn(change, concerned, inside)
        token = _MADE_HERE.set(change)
        try:
            yield
        finally:
            _MADE_HERE.reset(token)
            with self._turn:
                self._making = None
                self._turn.notify_all()

    def _await_turn(
        self,
        change: _Change,
        concerned: Callable[[], Concerned],
        inside: Collection[object],
        outer: _Change | None = None,
    ) -> None:
        with self._turn:
            self._waiting.append(change)
            try:
                while self._making is not outer or self._disturbs(change, concerned, inside):
                    self._turn.wait()
                if outer is None:
                    self._making = change
                else:
                    outer.take_in(change)
            finally:
                self._waiting.remove(change)
                self._turn.notify_all()

    def _disturbs(self, change: _Change, concerned: Callable[[], Concerned], inside: Collection[object]) -> bool:
        """Tell whether calls are under way that a change concerns."""
        change.names = concerned()
        disturbed = [call for call, used in self._calls.items() if change.concerns(used)]
        leased = next((self._calls[call] for call in disturbed if call in self._leases), None)
        if leased is not None:
            raise AdapterError(
                f"{', '.join(leased)} is leased from a bank, and was to be changed; nothing was changed.",
                hint="Release its leases first.",
            )
        if any(call in inside for call in disturbed):
            raise AdapterError(
                "The adapters were to be changed inside a call of the model that uses them; nothing was changed.",
                hint="Change them after the call: a hook, a streamer or a stopping criterion can note what is wanted.",
            )
        return bool(disturbed)


# The change that this context makes. No part of a call's state, for calls are made inside changes as well.
_MADE_HERE: ContextVar[_Change | None] = ContextVar("veneer_change", default=None)
