"""Holds a request while an engine answers it: what it has so far, and who takes its tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from veneer.adapters.bank_plan import BankLease
from veneer.errors import EngineError
from veneer.patches.selection import BASE
from veneer.serving.answer_text import AnswerText
from veneer.serving.engine_types import EngineRequest, TokenEvent
from veneer.serving.sampler import SamplingState

# Of the jobs of a process: requests' own ids may repeat.
_KEYS = itertools.count()


class Job:
    """Answers one request, under a key that no other job has.

    Args:
        request: what is asked.
        send: takes each event, on a thread of the engine; an error is the last.
        tokenizer: makes the text; without one there is none.
        end_tokens: end an answer, unless the request ignores them.
        keeps_logits: keep the logits of the last token, for a check of the engine.
    """

    def __init__(
        self,
        request: EngineRequest,
        send: Callable[[TokenEvent | EngineError], None],
        tokenizer: Any = None,
        end_tokens: Collection[int] = (),
        keeps_logits: bool = False,
    ) -> None:
        self.request, self.send = request, send
        self.key = f"{next(_KEYS)}"
        self.end_tokens = frozenset() if request.sampling.ignore_eos else frozenset(end_tokens)
        self.state = SamplingState.of(request.sampling)
        self.text = AnswerText(tokenizer, request.sampling.stop)
        # Keeps its adapter in the bank; given before the job is submitted.
        self.lease: BankLease | None = None
        self.keeps_logits = keeps_logits
        self.logits: Tensor | None = None
        # True once the last event is on its way.
        self.ended = False
        self._count = 0

    @property
    def adapter(self) -> str:
        """The name of its adapter on the model, which is the version."""
        return self.request.version or BASE

    @property
    def active_lease(self) -> BankLease | None:
        """Its lease; ``None`` for the base, and once it is released."""
        return self.lease if self.lease is not None and self.lease.is_active else None

    def release(self) -> None:
        """Give its lease back."""
        if self.lease is not None:
            self.lease.release()

    def check_finite(self) -> None:
        """Raise ``EngineError`` where its logits were not finite, and its tokens mean nothing."""
        if not self.state.is_finite:
            whose = "base" if self.request.version is None else "adapter"
            raise EngineError(f"The {whose}'s logits are not finite.", hint="Check its tensors: veneer inspect.")

    def accept(self, tokens: Sequence[int], complete: bool) -> None:
        """Hand on the tokens that are new.

        Args:
            tokens: all tokens generated so far.
            complete: there will be no more.
        """
        for number in range(self._count, len(tokens)):
            if self.ended:
                return
            self._count = number + 1
            self.send(self._event(number, tokens[number], complete and self._count == len(tokens)))

    def fail(self, error: EngineError) -> None:
        """End with an error, unless it has ended."""
        if not self.ended:
            self.ended = True
            self.send(error)

    def abort(self) -> None:
        """End without another token, unless it has ended."""
        if not self.ended:
            self.ended = True
            self.send(TokenEvent(None, self.text.rest(), finish="abort"))

    def _event(self, number: int, token: int, last: bool) -> TokenEvent:
        at_end = token in self.end_tokens
        text = "" if at_end else self.text.add(token)
        if at_end or last:
            text += self.text.rest()
        finish = "stop" if at_end or self.text.stopped else "length" if last else None
        self.ended = finish is not None
        if self.request.sampling.top_logprobs is None:
            return TokenEvent(token, text, finish=finish)
        sampled = self.state.reported[number]
        return TokenEvent(token, text, sampled.logprob, sampled.alternatives, finish)
