"""Watches an engine's lane: hands its tokens on, starts it anew when it dies, and finds out which version kills it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

import torch

from veneer.errors import EngineError
from veneer.printing import first_line
from veneer.serving.lane import Lane

# A version that was in the batch at so many deaths within so many seconds is not served any more.
_DEATHS = 2
_WINDOW = 300.0
# Seconds that the supervisor waits for tokens before it looks after the lane.
_POLL = 0.1
# Seconds between attempts to start a lane that does not start.
_RETRY = 1.0

_logger = logging.getLogger(__name__)


class DeathLog:
    """Remembers which versions were in the batch when the lane died."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.deaths: list[tuple[float, frozenset[str]]] = []
        # Version -> why it is no longer served.
        self.quarantined: dict[str, str] = {}

    def note(self, error: BaseException, versions: Collection[str]) -> None:
        """Note a death, and quarantine each version that was there at the last one too.

        Memory that runs out is nobody's fault.
        """
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return
        now = self.now()
        self.deaths = [death for death in self.deaths if now - death[0] <= _WINDOW]
        self.deaths.append((now, frozenset(versions)))
        for version in versions:
            count = sum(version in batch for _, batch in self.deaths)
            if count >= _DEATHS:
                why = f"It was in the batch at {count} failures of the engine; the last: {first_line(error)}."
                self.quarantined = {**self.quarantined, version: why}

    def forgive(self, version: str) -> None:
        """Forget a version that is loaded anew."""
        self.quarantined = {other: why for other, why in self.quarantined.items() if other != version}
        self.deaths = [(at, batch - {version}) for at, batch in self.deaths]


class Supervisor(threading.Thread):
    """Hands tokens on and starts the lane anew, until it is ended.

    Attributes:
        restarts: how often the lane was started anew.
        error: why it last died.
    """

    def __init__(self, lane: Lane) -> None:
        super().__init__(name="veneer-supervisor", daemon=True)
        self.lane = lane
        self.deaths = DeathLog()
        self.restarts = 0
        self.error: str | None = None
        self._ending = threading.Event()

    def run(self) -> None:
        """Watch until :meth:`end`."""
        while not self._ending.is_set():
            self.lane.deliver(_POLL)
            failure = self.lane.failure
            if failure is not None and not self._ending.is_set():
                self._recover(failure)

    def end(self) -> None:
        """Stop watching, and wait for the thread."""
        self._ending.set()
        if self.is_alive():
            self.join()

    def _recover(self, failure: BaseException) -> None:
        self.error = f"{type(failure).__name__}: {first_line(failure)}"
        self.deaths.note(failure, self.lane.batch)
        self.lane.fail_all(EngineError(f"A step of the engine failed ({self.error})."))
        self.lane.stop()
        while not self._ending.is_set():
            try:
                self.lane.start()
            except Exception as error:  # whatever it is, the server goes on to answer that it is down
                self.error = f"{type(error).__name__}: {first_line(error)}"
                _logger.exception("The engine does not start.")
                self._ending.wait(_RETRY)
            else:
                self.restarts += 1
                return
