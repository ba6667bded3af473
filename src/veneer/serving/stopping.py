"""Ends the process when a signal tells it to stop while it starts: nothing is left behind, and the exit code is 0."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Takes the signals that end a process, except while uvicorn takes them.

    The first lets what runs give back what it holds; the second ends the process at once.
    """

    def __init__(self) -> None:
        self._told = self._runs = False
        self._task: asyncio.Task[None] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take the signals while the block runs; it ends by ``SystemExit``."""
        if threading.current_thread() is not threading.main_thread():  # which gets no signals
            yield
            return
        earlier = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    @contextmanager
    def temporary_folder(self, prefix: str) -> Iterator[Path]:
        """Yield a folder that is gone with the process, however it ends."""
        # Threads that go on may write there while it is removed.
        self._temporary = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        with self._temporary as folder:
            yield Path(folder)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine, which a signal cancels."""
        self._runs = True
        try:
            asyncio.run(self._run(work))
        except asyncio.CancelledError:
            raise SystemExit(0) from None
        finally:
            self._runs = False

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.current_task()
        if self._told:  # while the loop was made
            work.close()
            raise asyncio.CancelledError
        await work

    def leave(self, code: int) -> None:
        """End the process now, though threads go on."""
        if self._temporary is not None:
            self._temporary.cleanup()
        os._exit(code)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            self.leave(0)
        self._told = True
        if not self._runs:
            raise SystemExit(0)
        if self._task is not None and not self._task.done():
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
