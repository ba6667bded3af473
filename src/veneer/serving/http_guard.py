"""Guards all routes: names requests, refuses other sites' pages, limits bodies, answers failures, counts answers."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar
from urllib.parse import SplitResult, quote, urlsplit

from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serving.errors_http import (
    BodyTooLargeError,
    HostNotAllowedError,
    RequestTimeoutError,
    WrongContentTypeError,
    error_response,
    refusal_of,
)
from veneer.serving.stream import ClientGoneError

LOG = logging.getLogger("veneer.serve")
BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# By probes and scrapers, every few seconds.
_ASKED_OFTEN = ("/health", "/ready", "/metrics")

Body = TypeVar("Body", bound=BaseModel)
# Status and seconds of an answer; 499 where the client went away.
OnAnswer = Callable[[int, float], None]


class Guard:
    """Wraps the application; see the module.

    Args:
        app: what answers.
        on_answer: told of each answer.
        hosts: names of this server in the header ``host``; ``None`` allows all, where keys protect the routes.
    """

    def __init__(self, app: ASGIApp, on_answer: OnAnswer, hosts: Iterable[str] | None) -> None:
        self._app, self._on_answer = app, on_answer
        self._hosts = None if hosts is None else {"localhost", *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        answered = _Answered(send, request_id)
        try:
            self._check_site(headers)
            await self._app(scope, receive, answered.send)
        except Exception as error:
            await self._fail(error, answered, scope, receive)
        finally:
            self._on_answer(answered.status, time.monotonic() - answered.begin)
            level = logging.DEBUG if scope["path"] in _ASKED_OFTEN and answered.status == 200 else logging.INFO
            # The path comes with its escapes undone: those of line ends would forge lines of the log.
            path = quote(scope["path"][:200], safe="/:@", errors="replace")
            LOG.log(level, "%s %s %s %s", request_id, scope["method"], path, answered.status)

    async def _fail(self, error: Exception, answered: _Answered, scope: Scope, receive: Receive) -> None:
        if isinstance(error, (ClientDisconnect, ClientGoneError)):
            answered.status = 499
            return
        refusal = refusal_of(error)
        if refusal.status == 500:
            LOG.error("%s failed", answered.request_id, exc_info=error)
        if not answered.started:
            await error_response(refusal)(scope, receive, answered.send)

    def _check_site(self, headers: Headers) -> None:
        """Refuse what a page of another site sends: without keys, whoever reaches the server may use it."""
        if self._hosts is None:
            return
        host = headers.get("host", "")
        name = _split(f"//{host}").hostname or ""
        if not (name in self._hosts or _is_address(name)):
            raise HostNotAllowedError(
                f"This server is not {name[:80]!r}.",
                hint="Without --api-keys it answers to its address and to localhost alone.",
            )
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise HostNotAllowedError(
                "A page of another site may not use this server.", hint="Start it with --api-keys, or call it directly."
            )


class _Answered:
    """Adds the headers that all answers have, and notes the status; 499 as long as there is none."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.started, self.status, self.begin = False, 499, time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers.setdefault("x-content-type-options", "nosniff")
        await self._send(message)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _split(url: str) -> SplitResult:
    """Return the parts of a URL; of one that is none, empty ones."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def body_of(kind: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """Return a dependency that reads and validates a body; pydantic's parser bounds the depth of its JSON."""

    async def read(request: Request) -> Body:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise WrongContentTypeError(
                "The body is not declared as JSON.", hint="Send content-type: application/json."
            )
        try:
            data = await asyncio.wait_for(_read(request), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            message = f"The body did not arrive within {BODY_SECONDS:g} seconds."
            raise RequestTimeoutError(message, hint="Send it at once.") from error
        return kind.model_validate_json(data)

    return read


async def _read(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > BODY_BYTES:
            raise BodyTooLargeError(f"The body has more than {BODY_BYTES} bytes.", hint="Send less at once.")
    return bytes(data)
