"""Sends answers: events of several generations as they come, as server-sent events, until the client goes away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from veneer.serving.engine_types import TokenEvent
from veneer.serving.errors_http import error_body, refusal_of
from veneer.serving.serving_errors import DeadlineExceededError

HEARTBEAT_SECONDS = 10.0
# A client that takes no byte for so long is gone.
SEND_SECONDS = 60.0

Indexed = tuple[int, "TokenEvent | Exception"]
Events = AsyncIterator["Indexed | None"]


class Generations:
    """Runs several generations side by side, and yields their events as they come.

    Use as an async context: its end cancels what still runs, and waits until that has freed what it held.
    """

    def __init__(self, sources: Sequence[AsyncIterator[TokenEvent]], timeout: float) -> None:
        self._sources = sources
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        # An event, an error, or the end of a source; nothing at all for a tick of the clock.
        self._queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None] | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._clock: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Generations:
        self._tasks = [asyncio.create_task(self._pump(*item)) for item in enumerate(self._sources)]
        self._wind()
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._clock is not None:
            self._clock.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wind(self) -> None:
        """Let the clock tick: a timer for each answer costs less than one for each token."""
        patience = max(0.0, min(HEARTBEAT_SECONDS, self._deadline - time.monotonic()))
        self._clock = asyncio.get_running_loop().call_later(patience, self._tick)

    def _tick(self) -> None:
        self._queue.put_nowait(None)
        if time.monotonic() < self._deadline:
            self._wind()

    async def _pump(self, index: int, source: AsyncIterator[TokenEvent]) -> None:
        try:
            async for event in source:
                self._queue.put_nowait((index, event))
        except Exception as error:
            self._queue.put_nowait((index, error))
        self._queue.put_nowait((index, None))

    async def events(self) -> AsyncIterator[Indexed | None]:
        """Yield ``(index, event)``, an exception in place of the event where a generation failed, ``None`` when idle.

        Raises:
            DeadlineExceededError: the time is over.
        """
        running, is_idle = len(self._sources), True
        while running:
            item = await self._queue.get()
            if item is None:
                self._check_deadline()
                if is_idle:
                    yield None
                is_idle = True
            elif item[1] is None:
                running -= 1
            else:
                is_idle = False
                yield item[0], item[1]

    def _check_deadline(self) -> None:
        if time.monotonic() >= self._deadline:
            raise DeadlineExceededError(
                f"The answer was not ready within {self._timeout:g} seconds.",
                hint="Ask for fewer tokens, or set `timeout`, as far as --request-timeout allows.",
            )


def event_of(item: Indexed) -> TokenEvent:
    """Return the event, or raise the error that stands in its place."""
    if isinstance(item[1], Exception):
        raise item[1]
    return item[1]


class ClientGoneError(Exception):
    """The client has closed the connection, or takes nothing of it."""


class Answer(Response):
    """Runs a coroutine that answers a request, and cancels it when the client goes away."""

    def __init__(self, work: Callable[[Sender], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or raise ``ClientGoneError``."""
        sender = Sender(send)
        work = asyncio.ensure_future(self._work(sender))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not (await asyncio.wait({work, gone}, timeout=SEND_SECONDS / 4, return_when=asyncio.FIRST_COMPLETED))[
                0
            ]:
                if sender.is_stuck:
                    raise ClientGoneError
            if work.done():
                work.result()
            elif not sender.complete:
                raise ClientGoneError
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Sender:
    """Sends the parts of one answer; ``complete`` from the last on."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._since: float | None = None
        self.complete = False

    @property
    def is_stuck(self) -> bool:
        """True where the client takes nothing."""
        return self._since is not None and time.monotonic() - self._since > SEND_SECONDS

    async def json(self, body: Any, headers: Mapping[str, str]) -> None:
        """Send a whole answer."""
        data = encoded(body)
        await self._start("application/json", {**headers, "content-length": str(len(data))})
        await self._body(data, more=False)

    async def begin_events(self, headers: Mapping[str, str]) -> None:
        """Send the head of a stream of events."""
        # The second asks proxies not to collect the stream before they pass it on.
        await self._start("text/event-stream", {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def event(self, body: Any) -> None:
        """Send an event."""
        await self._body(b"data: " + encoded(body) + b"\n\n")

    async def heartbeat(self) -> None:
        """Send a comment, by which proxies see that the connection lives."""
        await self._body(b": waiting\n\n")

    async def end_events(self, error: Exception | None = None) -> None:
        """End the stream by ``[DONE]``, or by an error and without it."""
        last = b"[DONE]" if error is None else encoded(error_body(refusal_of(error)))
        await self._body(b"data: " + last + b"\n\n", more=False)

    async def _start(self, content_type: str, headers: Mapping[str, str]) -> None:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"content-type", content_type.encode("latin-1")))
        await self._out({"type": "http.response.start", "status": 200, "headers": raw})

    async def _body(self, data: bytes, more: bool = True) -> None:
        self.complete = not more
        await self._out({"type": "http.response.body", "body": data, "more_body": more})

    async def _out(self, message: Message) -> None:
        self._since = time.monotonic()
        try:
            await self._send(message)
        except OSError as error:
            raise ClientGoneError from error
        self._since = None


def encoded(body: Any) -> bytes:
    """Return JSON in UTF-8; half a character of a broken text becomes a question mark."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")
