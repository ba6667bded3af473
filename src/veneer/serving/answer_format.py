"""Puts generated tokens into OpenAI's forms: whole answers and chunks of a stream, of chats and of completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.serving.engine_types import TokenEvent, TokenLogprob

TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass
class Choice:
    """One answer as far as it has come."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenEvent] = field(default_factory=list)
    tokens: int = 0
    characters: int = 0
    finish: str | None = None

    def add(self, event: TokenEvent) -> None:
        """Add an event."""
        self.parts.append(event.text)
        self.characters += len(event.text)
        self.tokens += event.token is not None
        self.finish = event.finish
        if _is_told(event):
            self.logprobs.append(event)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)


def _is_told(event: TokenEvent) -> bool:
    """Tell whether a token's log-probability is reported: that of a token which ends the answer is not."""
    return event.logprob is not None and (event.finish != "stop" or bool(event.text))


class AnswerFormat:
    """The form of one answer; see the two classes below.

    Args:
        model: the model as the request names it.
        fingerprint: of base, adapter and version.
        token_text: gives the text of a token, for log-probabilities.
        logprobs: the request asks for log-probabilities.
    """

    prefix, object_whole, object_chunk = "", "", ""

    def __init__(self, model: str, fingerprint: str, token_text: TokenText, logprobs: bool) -> None:
        self._model, self._fingerprint, self._token_text, self._logprobs = model, fingerprint, token_text, logprobs
        self._created = int(time.time())

    def head(self, id: str, whole: bool) -> Json:
        """Return the fields that all parts of an answer have."""
        return {
            "id": f"{self.prefix}{id}",
            "object": self.object_whole if whole else self.object_chunk,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def first(self, index: int) -> Json | None:
        """Return the chunk's choice that begins an answer, where there is one."""
        return None

    def delta(self, index: int, choice: Choice, event: TokenEvent) -> Json | None:
        """Return the chunk's choice for an event that is in ``choice`` already; none where it adds nothing."""
        events = [event] if self._logprobs and _is_told(event) else []
        if not event.text and not events:
            return None
        return self._chunk(index, event.text, self._told(events, choice.characters - len(event.text)), None)

    def last(self, index: int, finish: str) -> Json:
        """Return the chunk's choice that ends an answer."""
        return self._chunk(index, None, None, finish)

    def whole(self, index: int, choice: Choice) -> Json:
        """Return the choice of a whole answer."""
        raise NotImplementedError

    def _chunk(self, index: int, text: str | None, logprobs: Json | None, finish: str | None) -> Json:
        raise NotImplementedError

    def _told(self, events: Sequence[TokenEvent], offset: int) -> Json | None:
        """Return the log-probabilities of some tokens; ``None`` where the request does not ask for them."""
        raise NotImplementedError


class ChatFormat(AnswerFormat):
    """The form of ``/v1/chat/completions``."""

    prefix, object_whole, object_chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._told(choice.logprobs, 0)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def _chunk(self, index: int, text: str | None, logprobs: Json | None, finish: str | None) -> Json:
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _told(self, events: Sequence[TokenEvent], offset: int) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [self._entry(event) for event in events], "refusal": None}

    def _entry(self, event: TokenEvent) -> Json:
        own = self._pair(TokenLogprob(event.token or 0, event.logprob or 0.0))
        return {**own, "top_logprobs": [self._pair(alternative) for alternative in event.alternatives]}

    def _pair(self, pair: TokenLogprob) -> Json:
        text = self._token_text(pair.token)
        # A part of a character has no text, and its bytes are not told by the tokenizer.
        return {"token": text, "logprob": _number(pair.logprob), "bytes": _bytes(text)}


class CompletionFormat(AnswerFormat):
    """The form of ``/v1/completions``."""

    prefix, object_whole, object_chunk = "cmpl-", "text_completion", "text_completion"

    def whole(self, index: int, choice: Choice) -> Json:
        return self._chunk(index, choice.text, self._told(choice.logprobs, 0), choice.finish)

    def _chunk(self, index: int, text: str | None, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": finish}

    def _told(self, events: Sequence[TokenEvent], offset: int) -> Json | None:
        if not self._logprobs:
            return None
        offsets = []
        for event in events:
            offsets.append(offset)
            offset += len(event.text)
        return {
            "tokens": [self._token_text(event.token or 0) for event in events],
            "token_logprobs": [_number(event.logprob or 0.0) for event in events],
            "top_logprobs": [self._alternatives(event) for event in events],
            "text_offset": offsets,
        }

    def _alternatives(self, event: TokenEvent) -> dict[str, float]:
        return {self._token_text(pair.token): _number(pair.logprob) for pair in event.alternatives}


def _number(logprob: float) -> float:
    """Return a log-probability as OpenAI writes it: one of minus infinity is -9999."""
    return max(logprob, -9999.0)


def _bytes(text: str) -> list[int] | None:
    return None if "\ufffd" in text else list(text.encode("utf-8", "replace"))


def usage(prompt: int, generated: int) -> Json:
    """Return the count of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
