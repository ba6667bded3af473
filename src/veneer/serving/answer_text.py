"""Turns the tokens of an answer into its text, as they come, and ends it at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.peft_model.stop_strings import before_stop, settled


class AnswerText:
    """Decodes an answer token by token. Text that may yet become a stop string is held back.

    Args:
        tokenizer: of transformers; without one there is no text.
        stops: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._decoder = None if tokenizer is None else _decoder_of(tokenizer)
        self._held = ""

    def add(self, token: int) -> str:
        """Return the text that a token completes; :attr:`stopped` tells whether a stop string ends it."""
        if self._decoder is None:
            return ""
        return self._settle(self._held + self._decoder.add(token))

    def rest(self) -> str:
        """Return the text that was held back, where the answer ends without a stop string."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._settle(self._held + self._decoder.rest())
        return text if self.stopped else text + self._held

    def _settle(self, text: str) -> str:
        told = settled(text, self.stops)
        self.stopped = before_stop(text, self.stops) != text
        self._held = "" if self.stopped else text[len(told) :]
        return told


class _FastDecoder:
    """Decodes with ``tokenizers``, which keeps the tokens of an unfinished character."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.stream = self._new_stream()
        self.pending: list[int] = []

    def add(self, token: int) -> str:
        self.pending.append(token)
        try:
            text = self.stream.step(self.backend, token)
        except Exception:  # some byte sequences break a stream; it begins anew behind them
            self.stream = self._new_stream()
            return self.rest()
        if text is None:
            return ""
        self.pending.clear()
        return str(text)

    def rest(self) -> str:
        text = self.backend.decode(self.pending, skip_special_tokens=True) if self.pending else ""
        self.pending.clear()
        return str(text)

    @staticmethod
    def _new_stream() -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(skip_special_tokens=True)


class _SlowDecoder:
    """Decodes with a tokenizer in Python, all tokens again at each one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.told = ""

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self._decoded()
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._new(text)

    def rest(self) -> str:
        return self._new(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        new, self.told = text[len(self.told) :], text
        return new


def _decoder_of(tokenizer: Any) -> _FastDecoder | _SlowDecoder:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _SlowDecoder(tokenizer) if backend is None else _FastDecoder(backend)
