"""Remembers what failed a short time ago, so that it is not tried again for each request."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from veneer.serving.serving_errors import ServingError

_MOST = 1024


@dataclass(frozen=True)
class _Failure:
    error: ServingError
    tries: int
    until: float


class Failures:
    """Holds the last failures by a key; each further one of the same key keeps it for twice as long."""

    def __init__(
        self, first: float = 1.0, longest: float = 300.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first, self._longest, self._clock = first, longest, clock
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures)

    def check(self, key: str) -> None:
        """Raise the failure of a key again, where it is not over yet."""
        failure = self._failures.get(key)
        if failure is not None and self._clock() < failure.until:
            raise again(failure.error, failure.until - self._clock())

    def last(self, key: str) -> ServingError | None:
        """Return the last failure of a key; ``None`` where it has worked since."""
        failure = self._failures.get(key)
        return failure.error if failure else None

    def note(self, key: str, error: ServingError) -> None:
        """Remember a failure; the oldest is forgotten where there are too many."""
        last = self._failures.pop(key, None)
        tries = 1 + (last.tries if last else 0)
        delay = min(self._first * 2.0 ** min(tries - 1, 60), self._longest)
        self._failures[key] = _Failure(again(error, error.retry_after), tries, self._clock() + delay)
        while len(self._failures) > _MOST:
            self._failures.popitem(last=False)

    def forget(self, key: str) -> None:
        """Forget the failures of a key, which has worked, or is gone."""
        self._failures.pop(key, None)


def again(error: ServingError, retry_after: float | None = None) -> ServingError:
    """Return a new error of the same text, without the frames of the first."""
    return type(error)(error.message, hint=error.hint, retry_after=retry_after, param=error.param)
