"""A service around the engine without a model, with an adapter ``a`` and the base, and a client of plain HTTP."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.serving.fake_engine import ROWS, FakeEngine, word_tokenizer
from veneer.serving.admission import Admission, Admitted
from veneer.serving.auth import Caller, Keys
from veneer.serving.metrics import ServerMetrics
from veneer.serving.prompt_tokens import PromptTokenizer
from veneer.serving.registry import Registry
from veneer.serving.registry_types import AdapterInfo, State, StoredAdapter, Use, VersionInfo
from veneer.serving.service import Service, ServiceSettings
from veneer.serving.serving_errors import ModelNotFoundError, QueueFullError

DIGEST = "sha256:" + "a" * 64


class OneAdapter(Registry):
    """Knows the base and one adapter."""

    def __init__(self, folder: Path) -> None:
        self.stored = StoredAdapter(DIGEST, folder, 10, "LORA", 8, "base", ("adapter_model.safetensors",))
        self.held = 0

    @contextmanager
    def use(self, model: str, caller: Caller) -> Iterator[Use]:
        """Use."""
        if model != "base":
            self.adapter(model, caller)
        self.held += 1
        try:
            yield Use("base", None, None) if model == "base" else Use("a", DIGEST, self.stored)
        finally:
            self.held -= 1

    def adapters(self, caller: Caller) -> list[AdapterInfo]:
        """List."""
        version = VersionInfo(1, DIGEST, 5.0, "a", State.READY)
        info = AdapterInfo("a", State.READY, version, (version,), self.stored, memory_bytes=1000)
        return [info] if caller.may_use("a") else []

    def adapter(self, name: str, caller: Caller) -> AdapterInfo:
        """Find."""
        for info in self.adapters(caller):
            if info.name == name:
                return info
        raise ModelNotFoundError(f"No model is named {name!r}.", param="model")


class OpenDoor(Admission):
    """Admits all requests, or none."""

    def __init__(self) -> None:
        self.full, self.inside = False, 0
        self.hits = Counter(host=0, store=0)

    @asynccontextmanager
    async def admit(self, use: Use, caller: Caller, tokens: int) -> AsyncIterator[Admitted]:
        """Admit."""
        if self.full:
            raise QueueFullError("Too many requests wait.", hint="Come again.", retry_after=1.5)
        self.inside += 1
        try:
            yield Admitted(use, 0.0, 0.0)
        finally:
            self.inside -= 1

    def drain(self) -> None:
        """Drain."""

    @property
    def running(self) -> int:
        """Those inside."""
        return self.inside

    @property
    def waiting(self) -> int:
        """None."""
        return 0


def one_adapter_service(folder: Path, keys: Keys | None = None, **settings: Any) -> Service:
    """Return the service."""
    engine = FakeEngine(loaded={DIGEST: folder})
    return Service(
        ServiceSettings("base", "sha256:" + "b" * 64, **settings),
        engine,
        OneAdapter(folder),
        OpenDoor(),
        keys or Keys(),
        PromptTokenizer(word_tokenizer(), ROWS),
        ServerMetrics(),
        ready=True,
    )


@dataclass(frozen=True)
class Reply:
    """An answer of HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in it."""
        error: dict[str, Any] = self.json["error"]
        return error


def call(url: str, method: str, path: str, body: Any = None, timeout: float = 20, **headers: str) -> Reply:
    """Send one request; ``body`` is JSON, or bytes as they are."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"content-type": "application/json"} if data is not None else {}
    sent.update({name.replace("_", "-"): value for name, value in headers.items()})
    try:
        connection.request(method, path, data, sent)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def events_of(reply: Reply) -> list[Any]:
    """Return the events of a stream: JSON, and the text ``[DONE]``."""
    lines = [line[6:] for line in reply.body.decode().split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
