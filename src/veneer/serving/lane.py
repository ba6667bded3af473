"""Defines a lane, which computes the batches of an engine: continuous or, where a base needs it, static ones."""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from veneer.adapters.bank import AdapterBank
from veneer.errors import EngineError
from veneer.peft_model.peft_model import PeftModel
from veneer.printing import first_line
from veneer.serving.job import Job
from veneer.serving.work_counts import StepMeter


@dataclass(frozen=True)
class LaneOptions:
    """The sizes of an engine's batches and of its cache.

    Attributes:
        max_batch_tokens: the most tokens that one step computes; a longer prompt takes several.
        max_requests: the most requests in a batch.
        max_context: the most tokens of a prompt and its answer; the base's own bound when ``None``.
        cache_bytes: of the cache of keys and values; enough for :data:`DEFAULT_CACHE_TOKENS` when ``None``.
        page_size: the tokens of a page of the cache; by the device when ``None``.
        slots: how many adapters the bank holds, of each rank; or a rank -> how many of it.
        rank_buckets: the ranks of the bank's slots.
    """

    max_batch_tokens: int = 512
    max_requests: int = 64
    max_context: int | None = None
    cache_bytes: int | None = None
    page_size: int | None = None
    slots: int | Mapping[int, int] = 32
    rank_buckets: Sequence[int] = (8, 16, 64)


DEFAULT_CACHE_TOKENS = 16384


@dataclass(frozen=True)
class LaneLoad:
    """How busy a lane is.

    Attributes:
        running: the requests in the batch.
        waiting: those that are not in it yet.
        cache_used: the share of the cache in use.
    """

    running: int
    waiting: int
    cache_used: float = 0.0


class Lane(abc.ABC):
    """Computes answers on a thread of its own, and hands them to the jobs.

    Attributes:
        model: the base with its adapters.
        options: sizes.
        bank: holds the adapters of the batch.
        jobs: those that it answers, by their keys. One that is taken out gets no more tokens.
        batch: the adapters of the last step.
        progress: when a step last began or ended, of ``time.monotonic``.
        meter: measures the steps.
        max_context: the most tokens that a prompt and its answer may have together.
    """

    max_context: int
    # True where its steps run all sequences in one row.
    packed: bool

    def __init__(self, model: PeftModel, options: LaneOptions) -> None:
        self.model, self.options = model, options
        self.bank = AdapterBank(model.adapters, options.slots, options.rank_buckets, spills=False)
        self.jobs: dict[str, Job] = {}
        self.batch: tuple[str, ...] = ()
        self.progress = time.monotonic()
        self.meter = StepMeter()
        # Held while a job is added, and while all of them fail.
        self.lock = threading.RLock()

    def submit(self, job: Job) -> None:
        """Begin to answer a job.

        Raises:
            EngineError: the lane is not running.
        """
        with self.lock:
            if not self.jobs:
                self.step()
            self.jobs[job.key] = job
            try:
                self._add(job)
            except BaseException:
                del self.jobs[job.key]
                raise

    def forget(self, job: Job) -> None:
        """Let go of a job, and stop computing it if it has not ended."""
        if self.jobs.pop(job.key, None) is not None:
            self._cancel(job)
            self._release(job)

    def fail_all(self, error: EngineError) -> None:
        """End all jobs with an error."""
        with self.lock:
            for job in list(self.jobs.values()):
                job.fail(error)
                self.forget(job)

    def abort_all(self) -> None:
        """End all jobs without another token."""
        with self.lock:
            for job in list(self.jobs.values()):
                job.abort()
                self.forget(job)

    def step(self) -> float:
        """Note that there is progress, and return when."""
        self.progress = time.monotonic()
        return self.progress

    def uses(self, adapter: str) -> bool:
        """Tell whether a job runs under an adapter."""
        return any(job.adapter == adapter for job in list(self.jobs.values()))

    def hangs(self, limit: float) -> bool:
        """Tell whether a step has been running for more than ``limit`` seconds."""
        return bool(self.jobs) and time.monotonic() - self.progress > limit

    @abc.abstractmethod
    def start(self) -> None:
        """Start the thread."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End the thread, alive or not."""

    @property
    @abc.abstractmethod
    def alive(self) -> bool:
        """True while the thread takes requests."""

    @property
    @abc.abstractmethod
    def failure(self) -> BaseException | None:
        """Why the thread died, if it did."""

    @abc.abstractmethod
    def deliver(self, timeout: float) -> None:
        """Hand new tokens to their jobs; wait at most ``timeout`` seconds for the first."""

    @abc.abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """Keep the thread between two steps inside a ``with`` block."""

    @abc.abstractmethod
    def load(self) -> LaneLoad:
        """Return how busy it is."""

    def hand_on(self, job: Job | None, tokens: Sequence[int], complete: bool) -> None:
        """Give a job all its tokens so far; ``None`` is one that was forgotten."""
        if job is None:
            return
        try:
            job.check_finite()
            job.accept(tokens, complete)
        except EngineError as error:
            job.fail(error)
        except Exception as error:  # of its tokenizer: it ends this answer, and no other
            job.fail(EngineError(f"The answer cannot be put together: {first_line(error)}"))
        if job.ended:
            self.forget(job)

    @abc.abstractmethod
    def _add(self, job: Job) -> None: ...

    def _release(self, job: Job) -> None:
        job.release()

    @abc.abstractmethod
    def _cancel(self, job: Job) -> None: ...


def max_context(model: Any, options: LaneOptions) -> int:
    """Return the most tokens that a base and the options allow together."""
    bounds = options.max_context, getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((int(bound) for bound in bounds if bound), default=DEFAULT_CACHE_TOKENS)
