"""Estimates the time left of a run: a step takes about as long as earlier steps of its kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        text: the step under way.
        done: seconds spent on finished steps.
        left: expected seconds of all other steps; ``None`` before the first is finished.
    """

    text: str
    done: float
    left: float | None


@dataclass
class Timeline:
    """Counts the steps of a run by kind, and learns how long each kind takes.

    Steps differ a hundredfold in length, and a kind's length is known after its first step: an estimate from the mean
    speed, such as rich's, would be far off for kinds that come late.

    Attributes:
        on_progress: called when a step begins.
        clock: returns the time in seconds.
    """

    on_progress: Callable[[Progress], None]
    clock: Callable[[], float] = time.perf_counter
    _left: dict[str, int] = field(default_factory=dict)
    _guess: dict[str, float] = field(default_factory=dict)
    _took: dict[str, list[float]] = field(default_factory=dict)

    def plan(self, kind: str, count: int, guess: float) -> None:
        """Expect ``count`` steps of a kind; ``guess`` is their length relative to that of other kinds."""
        self._left[kind] = self._left.get(kind, 0) + count
        self._guess[kind] = guess

    @contextmanager
    def step(self, kind: str, text: str) -> Iterator[None]:
        """Time one step of a planned kind."""
        self.on_progress(Progress(text, sum(map(sum, self._took.values())), self.left()))
        started = self.clock()
        yield
        self._took.setdefault(kind, []).append(self.clock() - started)
        self._left[kind] -= 1

    def left(self) -> float | None:
        """Estimate the seconds left; ``None`` before the first step is finished."""
        spent = sum(map(sum, self._took.values()))
        guessed = sum(self._guess[kind] * len(took) for kind, took in self._took.items())
        if not guessed:
            return None
        return sum(count * self._expected(kind, spent / guessed) for kind, count in self._left.items())

    def _expected(self, kind: str, rate: float) -> float:
        took = self._took.get(kind)
        return sum(took) / len(took) if took else self._guess[kind] * rate
