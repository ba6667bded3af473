"""Runs a model and its adapters in transformers' continuous batching.

All that is relied upon of its internals stands here, and has a test of its own:

- a scheduler of ours in its registry, whose list of scheduled requests is the order in which they are packed;
- a model of ours, which names the adapter of each packed sequence;
- a logits processor of ours, which chooses the tokens: the engine itself only takes the likeliest.

Sequences never share a prefix in the cache: keys and values depend on the adapter, and its hash on the tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager, FIFOScheduler
from transformers.generation.continuous_batching import scheduler as registry
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from veneer.adapters.bank_plan import BankLease
from veneer.errors import AdapterError, EngineError
from veneer.peft_model.peft_model import PeftModel
from veneer.serving import packed_attention
from veneer.serving.job import Job
from veneer.serving.lane import DEFAULT_CACHE_TOKENS, Lane, LaneLoad, LaneOptions, max_context
from veneer.serving.packed_attention import PackedBatch
from veneer.serving.sampler import SamplingRow, choose

_SCHEDULER = "veneer"
# What transformers makes of eager attention for continuous batching.
_PAGED_EAGER = "paged|eager"
# Seconds that a thread may take to end its last step.
_JOIN = 5.0


class AdapterScheduler(FIFOScheduler):
    """Schedules as transformers does, and keeps the batch, in the order of its packing, and when it began."""

    scheduled: Sequence[Any] = ()
    began = 0.0

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        self.began = time.monotonic()
        batch = super().schedule_batch(token_budget, cache_budget)
        self.scheduled = batch[0] or ()
        return batch


registry.SCHEDULER_MAPPING[_SCHEDULER] = AdapterScheduler


class ServedModel(nn.Module):
    """Stands for a model in the continuous batching: one forward pass, each packed sequence under its adapter."""

    def __init__(self, model: PeftModel, lane: ContinuousLane) -> None:
        super().__init__()
        self.inner = model
        self.lane = lane

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model: Any = super().__getattr__("inner")
            return getattr(model.get_base_model(), name)

    def forward(self, **inputs: Any) -> Any:
        """Compute the logits of a packed batch."""
        if self.config._attn_implementation == packed_attention.NAME:
            inputs = _with_packed_batch(inputs)
        return self.lane.compute(inputs)

    def _get_logits_processor(self, generation_config: GenerationConfig, **_: Any) -> LogitsProcessorList:
        return LogitsProcessorList([RequestSampler(self.lane)])


def _with_packed_batch(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step for :mod:`veneer.serving.packed_attention`."""
    tokens, keys = (inputs["cu_seq_lens_q"], inputs["cu_seq_lens_k"][FULL_ATTENTION])
    batch = PackedBatch.of(tokens.diff().tolist(), keys.diff().tolist(), *inputs["read_index"])
    # A mask of four dimensions is one that transformers leaves as it is; nobody reads it.
    mask = tokens.new_empty(1, 1, 1, 0)
    return {**inputs, "packed_batch": batch, "read_index": [batch.read_index], "attention_mask": mask}


class PackedManager(ContinuousBatchingManager):
    """Batches continuously, with an attention of ours where transformers would take SDPA for full attention."""

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
        config = model.config.get_text_config()
        if model.config._attn_implementation == "sdpa" and set(group_layers_by_attn_type(config)) == {FULL_ATTENTION}:
            model.set_attn_implementation(packed_attention.NAME)
            self._original_attn_impl: Any = "sdpa"


class RequestSampler(LogitsProcessor):
    """Chooses each row's token, and makes it the likeliest one."""

    supports_continuous_batching = True

    def __init__(self, lane: ContinuousLane) -> None:
        self.lane = lane

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose the tokens of a batch, ``scores`` of shape ``(rows, vocabulary)``."""
        with self.lane.meter.phase("sample"):
            rows = self.lane.sampling_rows(scores)
            return scores.scatter_(1, choose(scores, rows)[:, None], float("inf"))


class ContinuousLane(Lane):
    """Computes answers by continuous batching: requests join and leave the batch between any two steps.

    Args:
        model: the base with its adapters.
        options: sizes.
        packs_attention: compute attention by :mod:`veneer.serving.packed_attention`, where that can be.
    """

    packed = True

    def __init__(self, model: PeftModel, options: LaneOptions, packs_attention: bool = True) -> None:
        super().__init__(model, options)
        self.packs_attention = packs_attention
        self.served = ServedModel(model, self)
        self.config = batching_config(model, options)
        self.manager: ContinuousBatchingManager | None = None

    # -- the thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        attention = self.model.config._attn_implementation
        try:
            self.manager = self._started_manager()
        except BaseException:
            self.model.set_attn_implementation(attention)  # there is no manager that `stop` would have restore it
            raise

    def _started_manager(self) -> ContinuousBatchingManager:
        make = PackedManager if self.packs_attention else ContinuousBatchingManager
        generation = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
        served: Any = self.served
        manager = make(served, generation, self.config)
        manager.warmup()  # makes the cache
        cache = _processor(manager).cache
        self.max_context = min(max_context(self.served, self.options), infer_max_single_request_tokens(cache))
        manager.start()
        return manager

    def stop(self) -> None:
        with self.lock:
            manager, self.manager = self.manager, None
        if manager is None:
            return
        manager.stop(block=True, timeout=_JOIN, hard_stop=True)
        if not manager.is_running():
            manager.destroy()

    @property
    def alive(self) -> bool:
        return self.manager is not None and self.failure is None

    @property
    def failure(self) -> BaseException | None:
        manager = self.manager
        if manager is None or manager.is_running():
            return None
        return manager.background_thread_status.fatal_error or EngineError("The engine's thread ended.")

    @contextmanager
    def paused(self) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._running().pause())
            except RuntimeError as error:  # it died meanwhile
                raise _not_running() from error
            self.step()
            with _plain_attention(self.model):
                yield
            self.step()

    def _running(self) -> ContinuousBatchingManager:
        if self.manager is None:
            raise _not_running()
        return self.manager

    # -- requests ------------------------------------------------------------------------------------------

    def _add(self, job: Job) -> None:
        request = job.request
        accepted = self._running().add_request(
            list(request.prompt),
            request_id=job.key,
            max_new_tokens=request.sampling.max_tokens,
            streaming=True,
            eos_token_id=sorted(job.end_tokens) or -1,
        )
        if not accepted:
            raise _not_running()

    def _cancel(self, job: Job) -> None:
        manager = self.manager
        if manager is not None:
            manager.cancel_request(job.key)

    def deliver(self, timeout: float) -> None:
        manager = self.manager
        if manager is None:
            time.sleep(timeout)
            return
        output = manager.get_result(timeout=timeout)
        while output is not None:
            if output.error is None:  # all jobs fail together, see `failure`
                self.hand_on(self.jobs.get(output.request_id), output.generated_tokens, output.is_finished())
            output = None if manager.output_router.output_queue.empty() else manager.get_result(timeout=0)

    def load(self) -> LaneLoad:
        manager = self.manager
        processor = None if manager is None else manager.batch_processor
        if processor is None:
            return LaneLoad(0, len(self.jobs))
        running = len(processor.scheduler.active_requests)
        return LaneLoad(running, max(0, len(self.jobs) - running), 1.0 - processor.cache.compute_free_capacity())

    # -- a step, on the engine's thread --------------------------------------------------------------------

    @property
    def scheduled(self) -> Sequence[Any]:
        """The requests of the batch, in the order of its packing."""
        return tuple(self._scheduler.scheduled)

    @property
    def _scheduler(self) -> Any:
        return _processor(self._running()).scheduler

    def compute(self, inputs: dict[str, Any]) -> Any:
        """Compute the logits of a packed batch, each sequence under its adapter."""
        started, tokens = self.step(), inputs["input_ids"].shape[1]
        self.meter.took("schedule", started - self._scheduler.began)
        while True:
            parts = self._parts(tokens)
            try:
                output = self.model(**inputs, adapter_names=self.bank.plan(parts))
            except AdapterError:
                if all(lease is None or lease.is_active for lease, _ in parts):
                    raise
                continue  # a job was cancelled, and its lease released, just before the bank was read
            self.meter.took("forward", self.step() - started)
            self.meter.computed(tokens, len(self.batch))
            return output

    def _parts(self, tokens: int) -> list[tuple[BankLease | None, int]]:
        """Return the lease and the length of each sequence of a packed batch of so many tokens."""
        parts = [(self._lease(request.state.request_id), request.query_length) for request in self.scheduled]
        missing = tokens - sum(length for _, length in parts)
        if missing < 0:
            raise EngineError(f"The batch has {tokens} tokens, and its schedule {tokens - missing}.")
        self.batch = tuple({str(lease.version) for lease, _ in parts if lease is not None})
        return [*parts, (None, missing)] if missing else parts

    def _lease(self, key: str) -> BankLease | None:
        # A cancelled job may be in one more step, and its adapter gone.
        job = self.jobs.get(key)
        return None if job is None else job.active_lease

    def sampling_rows(self, logits: Tensor) -> list[SamplingRow | None]:
        """Return what the sampler needs of each row of the logits."""
        rows = []
        for number, request in enumerate(one for one in self.scheduled if one.has_new_token):
            job = self.jobs.get(request.state.request_id)
            if job is not None and job.keeps_logits:
                job.logits = logits[number].clone()
            rows.append(None if job is None else _sampling_row(job, request.state))
        return rows


def _sampling_row(job: Job, state: Any) -> SamplingRow:
    # A request that was put off has its tokens among its prompt's.
    tokens = [*state.initial_tokens, *state.generated_tokens]
    return SamplingRow(job.state, job.request.prompt, tokens[len(job.request.prompt) :])


def _processor(manager: ContinuousBatchingManager) -> ContinuousBatchProcessor:
    assert manager.batch_processor is not None  # it is made by warmup()
    return manager.batch_processor


def batches_continuously(model: PeftModel) -> bool:
    """Tell whether transformers can batch a base continuously, as far as its config tells."""
    base = model.get_base_model()
    if not getattr(base, "_supports_attention_backend", False) or getattr(base, "_is_stateful", False):
        return False
    try:
        group_layers_by_attn_type(base.config.get_text_config())
    except ValueError:  # layers that are neither full nor sliding attention
        return False
    return True


@contextmanager
def _plain_attention(model: PeftModel) -> Iterator[None]:
    """Let calls without a paged cache compute eager attention inside the block; its paged form refuses them."""
    if model.config._attn_implementation != _PAGED_EAGER:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(_PAGED_EAGER)


def batching_config(model: PeftModel, options: LaneOptions) -> ContinuousBatchingConfig:
    """Return the options of transformers' continuous batching: our own sizes, no shared prefixes, no graphs."""
    on_gpu = model.device.type == "cuda"
    page_size = options.page_size or (256 if on_gpu else 32)
    return ContinuousBatchingConfig(
        scheduler_type=_SCHEDULER,
        page_size=page_size,
        num_blocks=max(1, _cache_tokens(model, options) // page_size),
        max_batch_tokens=options.max_batch_tokens,
        max_requests_per_batch=min(options.max_requests, options.max_batch_tokens),
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=on_gpu,
    )


def _cache_tokens(model: PeftModel, options: LaneOptions) -> int:
    if options.cache_bytes is None:
        return DEFAULT_CACHE_TOKENS
    config = model.config.get_text_config()
    values = 2 * config.num_hidden_layers * find_num_key_value_heads(config) * find_head_dim(config)
    return int(options.cache_bytes // (values * model.dtype.itemsize))


def _not_running() -> EngineError:
    return EngineError("The engine is not running.", hint="It starts again after a failure: try again in a moment.")
