"""Defines what the server asks of an engine, and what it gets back; imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from veneer.serving.work_counts import EngineWork


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen.

    Attributes:
        max_tokens: the most tokens to generate.
        temperature: 0.0 takes the likeliest token.
        top_k: choose among so many; 0 for all.
        top_p: choose among the likeliest that have this probability together.
        min_p: leave out what has less than this share of the likeliest one's probability.
        seed: the same seed and prompt give the same tokens, whatever else is in the batch.
        presence_penalty, frequency_penalty: as OpenAI defines them, over the tokens generated.
        repetition_penalty: as transformers defines it, over prompt and tokens generated.
        logit_bias: token -> what is added to its logit.
        top_logprobs: how many alternatives to report with each token; ``None`` for no log-probabilities.
        stop: texts that end the answer, and are not part of it.
        ignore_eos: go on to ``max_tokens``.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class EngineRequest:
    """A prompt to continue under one version of an adapter.

    Attributes:
        id: unique, and made by the server: a client's own id never comes here.
        prompt: its tokens.
        version: the digest of the adapter's version; ``None`` for the base.
        sampling: how tokens are chosen.
    """

    id: str
    prompt: tuple[int, ...]
    version: str | None
    sampling: Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model, before temperature and filters."""

    token: int
    logprob: float


@dataclass(frozen=True)
class TokenEvent:
    """One generated token; the last of a request says why it ended.

    Attributes:
        token: the token; ``None`` only in a last event that adds none.
        text: the text that it completes, which may be empty within a character or a possible stop text.
        logprob: its log-probability, where asked for.
        alternatives: the likeliest tokens there, where asked for.
        finish: ``None``, or ``"stop"``, ``"length"``, ``"abort"``.
    """

    token: int | None
    text: str = ""
    logprob: float | None = None
    alternatives: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class LoadedVersion:
    """An adapter's version that an engine holds.

    Attributes:
        version: its digest.
        changes_output: False where it computes exactly what the base does, as an adapter that was never trained.
        seconds: how long it took to load.
        nbytes: the memory of its tensors.
        bucket: the rank of the bucket of the batch's slots that it needs some of.
        slots: how many of them.
    """

    version: str
    changes_output: bool
    seconds: float
    nbytes: int
    bucket: int
    slots: int


@dataclass(frozen=True)
class EngineStatus:
    """The state of an engine at one moment.

    Attributes:
        alive: False when its thread is dead or hangs.
        hangs: True when a step takes longer than it may, which only the end of the process ends.
        error: why it last died, where it did.
        restarts: how often it was started anew.
        running: the requests in the batch.
        waiting: those that were accepted and are not in it yet.
        cache_used: the share of the cache in use, 0 to 1.
        slots: how many adapters the batch can hold.
        slots_used: how many it holds.
        resident: the digests of the versions that are loaded.
        quarantined: digest -> why the version is no longer served.
        work: that it has done.
        folded_bytes: the memory of the forms of versions that are kept for slots to come.
        bank_bytes: the memory of the batch's slots.
    """

    alive: bool
    hangs: bool = False
    error: str | None = None
    restarts: int = 0
    running: int = 0
    waiting: int = 0
    cache_used: float = 0.0
    slots: int = 0
    slots_used: int = 0
    resident: tuple[str, ...] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict)
    work: EngineWork = field(default_factory=EngineWork)
    folded_bytes: int = 0
    bank_bytes: int = 0


@dataclass(frozen=True)
class ServedBase:
    """The facts of a base that a server needs, and that its engine knows.

    Attributes:
        max_context: the most tokens that a prompt and its answer may have together.
        vocabulary: the number of tokens that it knows.
        tokenizer: its own.
        digest: of its files; ``None`` where it has none.
    """

    max_context: int
    vocabulary: int
    tokenizer: Any
    digest: str | None


class Engine(Protocol):
    """Answers requests with one base and the versions that are loaded. All its methods may be called by any thread."""

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""

    def start(self) -> None:
        """Load the base, start the thread, and warm up."""

    def stop(self, timeout: float) -> None:
        """End what runs after at most ``timeout`` seconds, and the thread."""

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load a version of an adapter from its folder in the store, and check that it acts as it should.

        A version that is loaded already stays as it is.

        Raises:
            VeneerError: it cannot be served; nothing of it is kept.
        """

    async def drop(self, version: str) -> None:
        """Free a version that no request uses; raise ``EngineError`` where one does."""

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """Generate; closing the iterator cancels the request and frees all that it held.

        Raises:
            EngineError: the version is not loaded, the prompt is too long for the cache, or a step failed.
        """

    def status(self) -> EngineStatus:
        """Return the state; never waits for the engine's thread."""


class ServedEngine(Engine, Protocol):
    """An engine that tells what a server needs to know of its base."""

    @property
    def served_base(self) -> ServedBase:
        """The facts of the base, once it is started."""
