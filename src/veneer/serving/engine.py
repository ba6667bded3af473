"""Answers requests with one base and many adapters, by transformers: the engine of ``veneer serve``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapters.bank import AdapterBank
from veneer.adapters.bank_plan import BankLease
from veneer.errors import AdapterError, EngineError, UnsupportedError, VeneerError
from veneer.peft_model.load import load
from veneer.peft_model.peft_model import PeftModel, wrap
from veneer.peft_model.tokenizer import load_tokenizer
from veneer.printing import warn
from veneer.serving.adapter_tokenizers import AdapterTokenizers
from veneer.serving.canary import Canary, lane_fault
from veneer.serving.continuous_batching import ContinuousLane, batches_continuously
from veneer.serving.engine_types import EngineRequest, EngineStatus, LoadedVersion, ServedBase, TokenEvent
from veneer.serving.job import Job
from veneer.serving.lane import Lane, LaneOptions
from veneer.serving.sampler import check_sampling
from veneer.serving.static_batches import StaticLane
from veneer.serving.supervisor import Supervisor

# Seconds that a change of the adapters waits for an engine that is being started anew.
_PATIENCE = 10.0
_POLL = 0.01
_READ = 1 << 24


@dataclass(frozen=True)
class EngineOptions(LaneOptions):
    """How an engine runs.

    Attributes:
        device: of the base; where it is when ``None``.
        dtype: of the base; ``"auto"`` keeps that of its files.
        step_timeout: the engine hangs when a step takes more seconds.
        trust_remote_code: run code that comes with the base.
    """

    device: str | None = None
    dtype: Any = "auto"
    step_timeout: float = 30.0
    trust_remote_code: bool = False


class TransformersEngine:
    """Answers requests by transformers; an adapter is named by its version, and always selected explicitly.

    Args:
        base: a path, a hub id, or a model in memory.
        options: sizes, device and dtype.
        tokenizer: the base's own when ``None``; a model in memory has none.
    """

    def __init__(
        self, base: str | Path | nn.Module, options: EngineOptions | None = None, tokenizer: Any = None
    ) -> None:
        self.options = options or EngineOptions()
        self.tokenizer = tokenizer
        self.resident: dict[str, LoadedVersion] = {}
        self._base = base
        self._model: PeftModel | None = None
        self._lane: Lane | None = None
        self._supervisor: Supervisor | None = None
        self._canary: Canary | None = None
        self._end_tokens: tuple[int, ...] = ()
        self._tokenizers: AdapterTokenizers | None = None
        # Version -> the tokenizer that it brings and is served with.
        self._own_tokenizers: dict[str, Any] = {}
        self._leasing = ThreadPoolExecutor(2, thread_name_prefix="veneer-leases")
        # Held while a request is checked and begins, and while a version goes.
        self._admitting = threading.Lock()
        # Held while a version comes or goes.
        self._changing = threading.Lock()

    # -- starting and stopping -----------------------------------------------------------------------------

    def start(self) -> None:
        """Load the base, start the thread, and warm up."""
        model = self._model = self._build()
        self._end_tokens = _end_tokens(model, self.tokenizer)
        self._tokenizers = AdapterTokenizers(self.tokenizer, self._vocabulary)
        lane = self._lane = _started_lane(model, self.options)
        self._canary = Canary(model, lane, self._between_steps)
        self._supervisor = Supervisor(lane)
        self._supervisor.start()

    def stop(self, timeout: float) -> None:
        """End what runs after at most ``timeout`` seconds, and the thread."""
        if self._lane is None or self._supervisor is None:
            return
        lane, supervisor, self._supervisor = self._lane, self._supervisor, None  # from now on nothing is admitted
        deadline = time.monotonic() + timeout
        while lane.jobs and time.monotonic() < deadline and supervisor.is_alive():
            time.sleep(_POLL)
        supervisor.end()
        lane.stop()
        lane.abort_all()

    def _build(self) -> PeftModel:
        options = self.options
        if isinstance(self._base, nn.Module):
            model = self._base if isinstance(self._base, PeftModel) else wrap(self._base)
        else:
            model = load(self._base, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
            if self.tokenizer is None:
                self.tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
        has_encoder = getattr(model.config, "is_encoder_decoder", False)
        if has_encoder or not model.can_generate():
            kind = " is an encoder-decoder, which" if has_encoder else ""
            raise UnsupportedError(
                f"{type(model.get_base_model()).__name__}{kind} does not go on with a text.",
                hint="Serve a causal language model.",
            )
        if options.device is not None:
            model.to(options.device)
        return model.eval().requires_grad_(False)

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def model(self) -> PeftModel:
        """The base with the adapters that are loaded; only the engine may call it."""
        if self._model is None:
            raise _not_started()
        return self._model

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self._running[0].max_context

    @property
    def served_base(self) -> ServedBase:
        """The facts of the base that a server needs."""
        return ServedBase(self.max_context, self._vocabulary, self.tokenizer, self.model.base_digest)

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """Generate; closing the iterator cancels the request and frees all that it held.

        Raises:
            EngineError: the version is not loaded, the prompt is too long for the cache, or a step failed.
        """
        events: asyncio.Queue[TokenEvent | EngineError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(event: TokenEvent | EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(request, send, *self._text_of(request.version))
        lane = await self._admit(job)
        try:
            while True:
                event = await events.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if event.finish is not None:
                    return
        finally:
            lane.forget(job)

    def _text_of(self, version: str | None) -> tuple[Any, tuple[int, ...]]:
        """Return the tokenizer of a version's text, and the tokens that end it."""
        own = self._own_tokenizers.get(version or "")
        if own is None:
            return self.tokenizer, self._end_tokens
        return own, (*self._end_tokens, *(() if own.eos_token_id is None else (own.eos_token_id,)))

    async def _admit(self, job: Job) -> Lane:
        request, (lane, _) = job.request, self._running
        self._check_version(request.version)
        self._check_request(request, lane)
        if request.version is not None:
            job.lease = await self._lease(lane.bank, request.version)
        try:
            with self._admitting:
                lane, _ = self._running
                self._check_version(request.version)  # it may have gone meanwhile
                lane.submit(job)
        except BaseException:
            job.release()
            raise
        return lane

    async def _lease(self, bank: AdapterBank, version: str) -> BankLease:
        """Lease a version, whose copy into a slot holds up nobody but its request.

        Raises:
            EngineError: it was dropped.
        """
        lease = functools.partial(bank.lease, version, needs_slots=False)
        leasing = asyncio.get_running_loop().run_in_executor(self._leasing, lease)
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:
            leasing.add_done_callback(_release)
            raise
        except AdapterError as error:
            self._check_version(version)  # it may have been dropped
            raise EngineError(error.message, hint=error.hint) from error

    def _check_version(self, version: str | None) -> None:
        if version is None:
            return
        why = self._running[1].deaths.quarantined.get(version)
        if why is not None:
            raise EngineError(f"The adapter's version {version} is quarantined. {why}", hint="Load another version.")
        if version not in self.resident:
            raise EngineError(f"The adapter's version {version} is not loaded.", hint="Load it first.")

    def _check_request(self, request: EngineRequest, lane: Lane) -> None:
        if self.tokenizer is None and request.sampling.stop:
            raise EngineError("Stop strings need a tokenizer.", hint="Give the engine the base's.")
        length, limit = len(request.prompt) + request.sampling.max_tokens, lane.max_context
        if not request.prompt or request.sampling.max_tokens < 1:
            raise EngineError("A request needs a prompt, and at least one token to generate.")
        if length > limit:
            raise EngineError(
                f"The prompt has {len(request.prompt)} tokens; with max_tokens={request.sampling.max_tokens} these are "
                f"{length}, and there is room for {limit}.",
                hint="Shorten the prompt or max_tokens.",
            )
        vocabulary = self._vocabulary
        outside = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise EngineError(
                f"The prompt has the token {outside}, and the base knows {vocabulary}.",
                hint="Is it made by the base's own tokenizer?",
            )
        check_sampling(request.sampling, vocabulary)

    # -- versions ------------------------------------------------------------------------------------------

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load a version of an adapter from its folder in the store, and check that it acts as it should.

        A version that is loaded already stays as it is.

        Raises:
            VeneerError: it cannot be served; nothing of it is kept.
        """
        return await asyncio.to_thread(self._load, version, Path(folder))

    async def drop(self, version: str) -> None:
        """Free a version that no request uses; raise ``EngineError`` where one does."""
        await asyncio.to_thread(self._drop, version)

    def _load(self, version: str, folder: Path) -> LoadedVersion:
        with self._changing:
            _, supervisor = self._running
            if version in supervisor.deaths.quarantined:  # its files may be well
                self.resident.pop(version, None)
                self._detach(version)
            if version not in self.resident:
                self.resident[version] = self._attach(version, folder)
                supervisor.deaths.forgive(version)
            return self.resident[version]

    def _attach(self, version: str, folder: Path) -> LoadedVersion:
        started = time.monotonic()
        assert self._canary is not None
        assert self._tokenizers is not None
        _read_ahead(folder)
        try:
            own = self._tokenizers.of(folder)
            if own is not None and own.tokenizer is not None:
                self._own_tokenizers[version] = own.tokenizer
            self.model.load_adapter(folder, adapter_name=version, strict_base=True)
            self._running[0].bank.register(version)
            changes = self._canary.check(version)
        except Exception as error:
            self._detach(version)
            if isinstance(error, VeneerError):
                raise
            raise UnsupportedError(
                f"The adapter cannot run in a mixed batch: {type(error).__name__}: {error}"
            ) from error
        size = self.model.adapters.get(version).nbytes
        need = self._running[0].bank.need(version)
        return LoadedVersion(version, changes, time.monotonic() - started, size, *need)

    def _drop(self, version: str) -> None:
        with self._changing:
            with self._admitting:
                if version not in self.resident:
                    raise EngineError(f"The adapter's version {version} is not loaded.")
                if self._running[0].uses(version):
                    raise EngineError(
                        f"The adapter's version {version} answers a request.",
                        hint="Drop it when its requests are over.",
                    )
                del self.resident[version]
            self._detach(version)

    def _detach(self, version: str) -> None:
        """Take an adapter off the model, as soon as no step and no request that comes too late holds it."""
        self._own_tokenizers.pop(version, None)
        deadline = time.monotonic() + _PATIENCE
        while version in self.model.adapters.by_name:
            try:
                self._delete(version)
            except AdapterError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)

    def _delete(self, version: str) -> None:
        if self._lane is not None and version in self._lane.bank:
            self._lane.bank.remove(version)
        self.model.delete_adapter(version)

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Keep the lane between two steps; wait for one that is being started anew.

        Raises:
            EngineError: it is not running.
        """
        deadline = time.monotonic() + _PATIENCE
        with contextlib.ExitStack() as stack:
            while True:
                lane, _ = self._running
                try:
                    stack.enter_context(lane.paused())
                    break
                except EngineError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_POLL)
            yield

    # -- state ---------------------------------------------------------------------------------------------

    @property
    def _running(self) -> tuple[Lane, Supervisor]:
        if self._lane is None or self._supervisor is None:
            raise _not_started()
        return self._lane, self._supervisor

    def status(self) -> EngineStatus:
        """Return the state; never waits for the engine's thread."""
        if self._lane is None or self._supervisor is None:
            return EngineStatus(alive=False, error="The engine is not started.")
        lane, supervisor = self._lane, self._supervisor
        hangs, dead = lane.hangs(self.options.step_timeout), not lane.alive or not supervisor.is_alive()
        load = lane.load()
        return EngineStatus(
            alive=not hangs and not dead,
            hangs=hangs,
            error=f"A step takes more than {self.options.step_timeout:g} s." if hangs else supervisor.error,
            restarts=supervisor.restarts,
            running=load.running,
            waiting=load.waiting,
            cache_used=load.cache_used,
            slots=_slots(self.options),
            slots_used=len({job.request.version for job in list(lane.jobs.values())} - {None}),
            resident=tuple(self.resident),
            quarantined=dict(supervisor.deaths.quarantined),
            work=lane.meter.work(lane.bank.counters),
            folded_bytes=lane.bank.folded_bytes,
            bank_bytes=lane.bank.nbytes,
        )


def _started_lane(model: PeftModel, options: EngineOptions) -> Lane:
    """Return a lane that answers: a continuous one, unless the base cannot have it."""
    name = type(model.get_base_model()).__name__
    for packs_attention in (True, False) if batches_continuously(model) else ():
        lane = ContinuousLane(model, options, packs_attention)
        try:
            fault = lane_fault(lane, model)
        except BaseException:  # the process is to end, and would wait for the lane's thread
            lane.stop()
            raise
        if fault is None:
            return lane
        lane.stop()
        instead = "with transformers' own attention" if packs_attention else "in static batches"
        warn(f"{name} is served {instead}, for a quicker way failed: {fault}.")
    static = StaticLane(model, options)
    static.start()
    return static


def _release(leasing: asyncio.Future[BankLease]) -> None:
    """Release a lease that nobody waits for any more."""
    if not leasing.cancelled() and leasing.exception() is None:
        leasing.result().release()


def _slots(options: EngineOptions) -> int:
    """Return how many adapters of the smallest rank fit in the bank."""
    return options.slots if isinstance(options.slots, int) else options.slots[min(options.slots)]


def _end_tokens(model: PeftModel, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer, as ``generate`` has them."""
    tokens = getattr(model.generation_config, "eos_token_id", None)
    if tokens is None and tokenizer is not None:
        tokens = tokenizer.eos_token_id
    return () if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _read_ahead(folder: Path) -> None:
    """Read an adapter's files once, so that no step waits for a disk."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file():
            with path.open("rb") as file:
                while file.read(_READ):
                    pass


def _not_started() -> EngineError:
    return EngineError("The engine is not started.", hint="Call its start().")
