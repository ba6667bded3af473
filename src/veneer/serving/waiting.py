"""Waits for a time at most; unlike ``asyncio.wait_for`` before Python 3.12 it never swallows a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until an event is set, at most ``seconds``; tell whether it is."""
    if not event.is_set() and seconds > 0:
        await _waited(asyncio.ensure_future(event.wait()), seconds)
    return event.is_set()


async def within(work: Awaitable[T], seconds: float) -> T:
    """Return the result of ``work``, which is cancelled after ``seconds``.

    Raises:
        TimeoutError: it was not there.
    """
    task = asyncio.ensure_future(work)
    if not await _waited(task, seconds):
        raise TimeoutError
    return task.result()


async def _waited(task: asyncio.Future[T], seconds: float) -> bool:
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.done()
    finally:
        task.cancel()
