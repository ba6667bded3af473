"""One lock for the set of adapters: who changes it, or has to see it as it is at one moment, holds the lock.

It is the lock of the choice (``ActiveSelection.choosing``). It is taken for moments, after what has to be waited for
(``ActiveSelection.changing``), so that a call which changes its choice waits for nobody who waits for the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Guarded(Protocol):
    """What has a choice of adapters."""

    switch: Any


S = TypeVar("S", bound=Guarded)


def guarded(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let one thread at a time be in this method, or in a block that holds the lock."""

    def held(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.switch.choosing:
            return method(self, *args, **kwargs)

    functools.update_wrapper(held, method)
    return held
