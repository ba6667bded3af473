"""Runs a model and its adapters in static batches of ``generate``, for bases that cannot be batched continuously.

A request waits until the batch before it is over. Within a batch the tokens of each row go out as they come, each row
ends by itself, and adapters may come and go between two steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from veneer.errors import EngineError
from veneer.patches.selection import BASE
from veneer.peft_model.peft_model import PeftModel
from veneer.serving.job import Job
from veneer.serving.lane import Lane, LaneLoad, LaneOptions, max_context
from veneer.serving.sampler import SamplingRow, choose

# Fills the rows of a batch; it is masked in a prompt, and nobody sees it in an answer.
_PAD = 0


class StepGate:
    """Lets one thread run step by step, and others close the gate between two of its steps."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = False
        self._closed = 0

    def enter(self) -> None:
        """Begin a step, once the gate is open."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside = True

    def leave(self) -> None:
        """End a step."""
        with self._changed:
            self._inside = False
            self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Keep the gate closed inside a ``with`` block, which begins when no step is running."""
        with self._changed:
            self._closed += 1
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._closed -= 1
                self._changed.notify_all()


class StaticLane(Lane):
    """Computes answers by batches that requests enter together."""

    packed = False

    def __init__(self, model: PeftModel, options: LaneOptions) -> None:
        super().__init__(model, options)
        self.max_context = max_context(model, options)
        self.gate = StepGate()
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outputs: queue.SimpleQueue[tuple[Job, list[int], bool]] = queue.SimpleQueue()
        self._rows: list[BatchRow] = []
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # -- the thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._failure = None
        self._waiting = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(self._waiting,), name="veneer-batches", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        self._waiting.put(None)
        for row in self._rows:
            row.done = True
        if thread is not None:
            thread.join()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    def paused(self) -> AbstractContextManager[None]:
        return self.gate.closed()

    def _work(self, waiting: queue.SimpleQueue[Job | None]) -> None:
        try:
            while True:
                jobs = self._next_jobs(waiting)
                if jobs is None:
                    return
                self._answer(jobs)
        except Exception as error:
            self._failure = error

    def _next_jobs(self, waiting: queue.SimpleQueue[Job | None]) -> list[Job] | None:
        """Return those that wait, once there is one; ``None`` at the end."""
        jobs = [waiting.get()]
        while len(jobs) < self.options.max_requests and not waiting.empty():
            jobs.append(waiting.get())
        return None if None in jobs else [job for job in jobs if job is not None and self._is_asked(job)]

    # -- requests ------------------------------------------------------------------------------------------

    def _add(self, job: Job) -> None:
        if not self.alive:
            raise EngineError("The engine is not running.", hint="Try again in a moment.")
        self._waiting.put(job)

    def _cancel(self, job: Job) -> None:
        for row in self._rows:
            row.done = row.done or row.job is job

    def _release(self, job: Job) -> None:
        # A cancelled row stays in its batch, under its adapter.
        if all(row.job is not job for row in self._rows):
            job.release()

    def uses(self, adapter: str) -> bool:
        return super().uses(adapter) or any(row.job.adapter == adapter for row in self._rows)

    def deliver(self, timeout: float) -> None:
        try:
            output = self._outputs.get(timeout=timeout)
            while True:
                self.hand_on(*output)
                output = self._outputs.get_nowait()
        except queue.Empty:
            return

    def load(self) -> LaneLoad:
        running = sum(not row.done for row in self._rows)
        return LaneLoad(running, max(0, len(self.jobs) - running))

    def _is_asked(self, job: Job) -> bool:
        return self.jobs.get(job.key) is job

    # -- a batch, on the lane's thread ---------------------------------------------------------------------

    @torch.no_grad()
    def _answer(self, jobs: list[Job]) -> None:
        rows = self._rows = [BatchRow(job) for job in jobs if self._is_asked(job)]
        for row in rows:
            row.done = not self._is_asked(row.job)
        self.batch = tuple({row.job.adapter for row in rows} - {BASE})
        try:
            self._begin_step()
            self._generate(rows)
        finally:
            self.gate.leave()
            self._rows = []
            for row in rows:
                if not self._is_asked(row.job):
                    row.job.release()

    def _begin_step(self) -> None:
        self.gate.enter()
        self.step()

    def _generate(self, rows: list[BatchRow]) -> None:
        if not rows:
            return
        longest = max(len(row.job.request.prompt) for row in rows)
        prompts = [[_PAD] * (longest - len(row.job.request.prompt)) + [*row.job.request.prompt] for row in rows]
        masks = [[int(place >= longest - len(row.job.request.prompt)) for place in range(longest)] for row in rows]
        device = self.model.device
        with _without_defaults(self.model.get_base_model()):
            self.model.generate(
                input_ids=torch.tensor(prompts, device=device),
                attention_mask=torch.tensor(masks, device=device),
                adapter_names=self.bank.plan([row.job.active_lease for row in rows]),
                max_new_tokens=max(row.job.request.sampling.max_tokens for row in rows),
                do_sample=False,
                pad_token_id=_PAD,
                logits_processor=LogitsProcessorList([RowSampler(rows)]),
                stopping_criteria=StoppingCriteriaList([RowEnds(self, rows)]),
            )

    def ends(self, tokens: list[int]) -> list[bool]:
        """Take in the tokens of a step, one for each row, and return which rows are over."""
        started, computed = self.progress, sum(row.computed for row in self._rows)
        self.meter.took("forward", self.step() - started)
        self.meter.computed(computed, len(self.batch))
        for row, token in zip(self._rows, tokens, strict=True):
            if not row.done:
                row.add(token)
                self._outputs.put((row.job, row.tokens[:], row.done))
        self.gate.leave()
        self._begin_step()
        return [row.done for row in self._rows]


class BatchRow:
    """A row of a static batch.

    Attributes:
        job: that it answers.
        tokens: generated so far.
        done: True when it needs no more.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens: list[int] = []
        self.done = False

    @property
    def computed(self) -> int:
        """The number of tokens that the last step computed for it."""
        return 0 if self.done else 1 if self.tokens else len(self.job.request.prompt)

    def add(self, token: int) -> None:
        """Add a token."""
        self.tokens.append(token)
        if token in self.job.end_tokens or len(self.tokens) >= self.job.request.sampling.max_tokens:
            self.done = True


class RowSampler(LogitsProcessor):
    """Chooses each row's token, and makes it the likeliest one."""

    def __init__(self, rows: list[BatchRow]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose the tokens of a step, ``scores`` of shape ``(rows, vocabulary)``."""
        rows = [
            None if row.done else SamplingRow(row.job.state, row.job.request.prompt, row.tokens) for row in self.rows
        ]
        scores = scores.float()
        return scores.scatter(1, choose(scores, rows)[:, None], float("inf"))


class RowEnds(StoppingCriteria):
    """Hands on the tokens of each step, and tells which rows are over."""

    def __init__(self, lane: StaticLane, rows: list[BatchRow]) -> None:
        self.lane, self.rows = lane, rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Take in the tokens of a step, and tell which rows are over."""
        return input_ids.new_tensor(self.lane.ends(input_ids[:, -1].tolist())).bool()


@contextmanager
def _without_defaults(base: Any) -> Iterator[None]:
    """Let ``generate`` ask for nothing of its own, such as an end token, inside the block."""
    config, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = config
