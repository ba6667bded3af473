"""The lock of the set of adapters, held to change it or to see it as it is at one moment.

It is the lock of the selection (``ActiveSelection.choosing``). It is taken for moments, after waiting for calls
(``ActiveSelection.changing``), so that a call which changes the selection waits for nobody who waits for the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Guarded(Protocol):
    """An object with a selection of adapters."""

    active_selection: Any


S = TypeVar("S", bound=Guarded)


def guarded(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let one thread at a time be in this method, or in a block that holds the lock."""

    def held(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.active_selection.choosing:
            return method(self, *args, **kwargs)

    functools.update_wrapper(held, method)
    return held
