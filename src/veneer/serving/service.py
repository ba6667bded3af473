"""Holds what all routes share, and asks the engine for the answer to one prompt."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from veneer.serving.audit import audit
from veneer.serving.engine_types import Engine, EngineRequest, Sampling, TokenEvent
from veneer.serving.metrics import Measured
from veneer.serving.serving_errors import ContextTooLongError, EngineRestartingError
from veneer.serving.template_process import TemplateProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from veneer.serving.admission import Admission
    from veneer.serving.auth import Caller, Keys
    from veneer.serving.metrics import ServerMetrics
    from veneer.serving.prompt_tokens import PromptTokenizer
    from veneer.serving.registry import Registry
    from veneer.serving.registry_types import Use


@dataclass(frozen=True)
class ServiceSettings:
    """The choices of the operator that concern the routes.

    Attributes:
        base_name: the name by which requests ask for the base.
        base_digest: of the base's files.
        runtime_adapters: adapters may be registered and removed while the server runs.
        request_timeout: the seconds after which an answer is given up.
        page: serve the page at ``/``.
        metrics_port: the port of the metrics; where the routes are when ``None``.
        gateway_metrics: add the gauges that gateways read, under vLLM's names.
        hosts: further names of this server; ``None`` allows all, since keys protect it.
    """

    base_name: str
    base_digest: str = ""
    runtime_adapters: bool = False
    request_timeout: float = 600.0
    page: bool = False
    metrics_port: int | None = None
    gateway_metrics: bool = False
    hosts: tuple[str, ...] | None = ()


@dataclass
class Service:
    """The parts of one server.

    Attributes:
        tiers: name of a place for adapters -> the bytes in it.
        templates: renders the chat templates that adapters bring.
        ready: new requests are taken.
        draining: none are taken any more.
        waiting, running: name of an adapter -> its requests.
    """

    settings: ServiceSettings
    engine: Engine
    registry: Registry
    admission: Admission
    keys: Keys
    tokenizer: PromptTokenizer
    metrics: ServerMetrics
    tiers: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    templates: TemplateProcess = field(default_factory=TemplateProcess)
    ready: bool = False
    draining: bool = False
    waiting: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)

    def drain(self) -> None:
        """Take no new requests."""
        self.draining = True
        self.admission.drain()

    def most_tokens(self, prompt: int, asked: int | None, default: int | None = None) -> int:
        """Return how many tokens an answer may have.

        Args:
            prompt: the tokens of the prompt.
            asked: what the request asks for.
            default: where it asks for nothing; all that fit without.

        Raises:
            ContextTooLongError: prompt and answer do not fit.
        """
        context = self.engine.max_context
        left = context - prompt
        most = asked if asked is not None else min(left, default or left)
        if most > left or left < 1:
            raise ContextTooLongError(
                f"The prompt has {prompt} tokens and the answer may have {asked or 1}: this server takes {context} "
                "together.",
                hint=f"Ask for {left} tokens at most." if left > 0 else "Shorten the prompt.",
                param="messages" if left < 1 else "max_tokens",
            )
        return most

    def _check_engine(self) -> None:
        if not self.engine.status().alive:
            raise EngineRestartingError("The engine is being started anew.", hint="Ask again.", retry_after=2)

    async def answer(
        self, use: Use, caller: Caller, prompt: tuple[int, ...], sampling: Sampling, request_id: str
    ) -> AsyncIterator[TokenEvent]:
        """Wait for the turn of a request, and yield what the engine generates.

        Args:
            use: the version that answers.
            caller: whose request it is.
            prompt: its tokens.
            sampling: how tokens are chosen.
            request_id: for the audit log; the engine gets an id of its own.
        """
        arrival = time.monotonic()
        self._check_engine()
        with ExitStack() as waiting:
            waiting.enter_context(_counted(self.waiting, use.name))
            async with self.admission.admit(use, caller, len(prompt) + sampling.max_tokens) as admitted:
                waiting.close()
                self.metrics.queued(admitted.queue_seconds)
                request = EngineRequest(uuid.uuid4().hex, prompt, use.digest, sampling)
                measured = Measured(arrival)
                try:
                    with _counted(self.running, use.name):
                        async with aclosing(self.engine.generate(request)) as events:  # type: ignore[type-var]
                            async for event in events:
                                measured.add(event)
                                if use.revoked.is_set():
                                    yield replace(event, finish="abort")
                                    break
                                yield event
                finally:
                    admitted.tokens = len(prompt) + measured.tokens
                    self.metrics.generated(use.name, len(prompt), measured)
                    audit(
                        "answered",
                        request=request_id,
                        by=caller.id,
                        adapter=use.label,
                        prompt_tokens=len(prompt),
                        tokens=measured.tokens,
                    )


@contextmanager
def _counted(counts: Counter[str], name: str) -> Iterator[None]:
    """Count one more of a name while the block runs."""
    counts[name] += 1
    try:
        yield
    finally:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
