"""Asks a server for completions, whose tokens are exact, and notes all that a client sees of the answer."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.serving.many_adapters import Question
from tests.serving.served_process import completion

PATIENCE = 120.0


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        name: the adapter's, or the base's.
        digest: the version, where the request names one.
        prompt: its tokens.
        tokens: how many are to be generated.
        streams: the answer comes token by token.
        leaves: the client leaves after so many events of a stream, or hundredths of a second; ``None`` for never.
    """

    name: str
    digest: str | None
    prompt: tuple[int, ...]
    tokens: int
    streams: bool = False
    leaves: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The body of the request."""
        model = self.name if self.digest is None else f"{self.name}@{self.digest.removeprefix('sha256:')[:12]}"
        more = {"stream": True, "stream_options": {"include_usage": True}} if self.streams else {}
        return completion(model, list(self.prompt), self.tokens, **more)


@dataclass
class Answered:
    """A request, and what became of it.

    Attributes:
        asked: the request.
        began, ended: when it was sent, and when the last byte came.
        headed: when its head came.
        status: of HTTP; 0 where its client left before.
        label: the version that its header names.
        text: the answer as far as it came.
        finish: why it ended; ``None`` where its client left, or an error ended it.
        generated: how many tokens the server counted.
        error: of the server, or what befell the connection.
        left: its client left.
    """

    asked: Asked
    began: float
    ended: float = 0.0
    headed: float = 0.0
    status: int = 0
    label: str = ""
    text: str = ""
    finish: str | None = None
    generated: int | None = None
    error: dict[str, Any] | None = None
    left: bool = False

    @property
    def tokens(self) -> list[int]:
        """The tokens of the text."""
        return [int(word.removeprefix("w")) for word in self.text.split()]

    @property
    def question(self) -> Question:
        """The same question for the oracle."""
        return Question(self.label.partition("@")[2] or None, self.asked.prompt)

    def add(self, event: dict[str, Any]) -> None:
        """Add what an event of a stream tells, or a whole answer."""
        self.error = event.get("error")
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish
        if event.get("usage"):
            self.generated = event["usage"]["completion_tokens"]


def answered(url: str, asked: Asked) -> Answered:
    """Send a request, and read its answer as far as the client stays."""
    answer = Answered(asked, time.monotonic())
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        connection.request("POST", "/v1/completions", json.dumps(asked.body), {"content-type": "application/json"})
        if asked.leaves is not None and not asked.streams:
            time.sleep(asked.leaves / 100)
            answer.left = True
        else:
            with connection.getresponse() as response:
                _read(response, answer)
    except (OSError, http.client.HTTPException) as error:
        answer.error = {"code": type(error).__name__, "message": str(error)}
    finally:
        connection.close()
    answer.ended = time.monotonic()
    return answer


def _read(response: http.client.HTTPResponse, answer: Answered) -> None:
    answer.headed, answer.status = time.monotonic(), response.status
    answer.label = response.headers.get("x-veneer-adapter", "")
    if response.headers["content-type"] != "text/event-stream":
        answer.add(json.loads(response.read()))
        return
    for number, event in enumerate(_events(response)):
        answer.add(event)
        if number == answer.asked.leaves:
            answer.left = True
            return


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream, which ends by ``[DONE]`` or an error."""
    for line in response:
        data = line.removeprefix(b"data: ")
        if data == line:
            continue
        if data.strip() == b"[DONE]":
            return
        event = json.loads(data)
        yield event
        if "error" in event:
            return
    raise http.client.IncompleteRead(b"")
