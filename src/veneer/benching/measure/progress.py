"""How far a run is, and how long the rest will take: what repeats takes about as long as it did before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        text: what is being done.
        done: seconds spent on steps that are finished.
        left: seconds that the others are expected to take; ``None`` before the first is finished.
    """

    text: str
    done: float
    left: float | None


@dataclass
class Timeline:
    """Steps by kind, each with a guess of its size, corrected by how long those of its kind took.

    Attributes:
        tell: called when a step begins.
        clock: the time in seconds.
    """

    tell: Callable[[Progress], None]
    clock: Callable[[], float] = time.perf_counter
    _left: dict[str, int] = field(default_factory=dict)
    _guess: dict[str, float] = field(default_factory=dict)
    _took: dict[str, list[float]] = field(default_factory=dict)

    def plan(self, kind: str, count: int, guess: float) -> None:
        """Expect ``count`` steps of a kind; ``guess`` is their size relative to other kinds'."""
        self._left[kind] = self._left.get(kind, 0) + count
        self._guess[kind] = guess

    @contextmanager
    def step(self, kind: str, text: str) -> Iterator[None]:
        """One step of a planned kind."""
        self.tell(Progress(text, sum(map(sum, self._took.values())), self.left()))
        started = self.clock()
        yield
        self._took.setdefault(kind, []).append(self.clock() - started)
        self._left[kind] -= 1

    def left(self) -> float | None:
        """Seconds to go."""
        spent = sum(map(sum, self._took.values()))
        guessed = sum(self._guess[kind] * len(took) for kind, took in self._took.items())
        if not guessed:
            return None
        return sum(count * self._expected(kind, spent / guessed) for kind, count in self._left.items())

    def _expected(self, kind: str, rate: float) -> float:
        took = self._took.get(kind)
        return sum(took) / len(took) if took else self._guess[kind] * rate
