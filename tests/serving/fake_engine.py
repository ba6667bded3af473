"""An engine without a model, and a way to serve over a socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veneer.errors import EngineError
from veneer.serving.app import create_app
from veneer.serving.engine_types import EngineRequest, EngineStatus, LoadedVersion, TokenEvent, TokenLogprob
from veneer.serving.service import Service
from veneer.serving.work_counts import StepMeter

ROWS = 99
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if loud %}w9 {% endif %}{% if add_generation_prompt %}w7{% endif %}"
)


def word_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the words ``w0`` to ``w98``."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(ROWS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def answer_token(version: str | None, prompt: int, seed: int, index: int) -> int:
    """Return the token that the engine below answers with."""
    return 3 + (sum(map(ord, version or "")) + 7 * prompt + 5 * seed + index) % (ROWS - 3)


@dataclass
class FakeEngine:
    """Answers with words that tell the version, the prompt's length, and the seed.

    Attributes:
        max_context: as the protocol has it.
        delay: seconds before each token.
        broken: fails each request after its first token.
        dead: its thread has died.
        hangs: its thread does not come back from a step.
        loaded: the versions that it holds.
        running: the ids of the requests under way.
        requests: all that it was asked.
        refused: why no version can be loaded.
        meter: of its steps, which it does not measure.
    """

    max_context: int = 64
    delay: float = 0.0
    broken: bool = False
    dead: bool = False
    hangs: bool = False
    loaded: dict[str, Path] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    requests: list[EngineRequest] = field(default_factory=list)
    refused: Exception | None = None
    meter: StepMeter = field(default_factory=StepMeter)

    def start(self) -> None:
        """Do nothing."""

    def stop(self, timeout: float) -> None:
        """Do nothing."""

    async def load(self, version: str, folder: Path) -> LoadedVersion:
        """Load."""
        if self.refused is not None:
            raise self.refused
        self.loaded[version] = folder
        return LoadedVersion(version, True, 0.0, 1000, 8, 1)

    async def drop(self, version: str) -> None:
        """Drop."""
        self.loaded.pop(version, None)

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """Generate."""
        self.requests.append(request)
        if request.version is not None and request.version not in self.loaded:
            raise EngineError("The version is not loaded.")
        self.running.add(request.id)
        try:
            for index in range(request.sampling.max_tokens):
                await asyncio.sleep(self.delay)
                if self.broken and index:
                    raise EngineError("The step failed.", hint="Ask again.")
                yield self._event(request, index)
        finally:
            self.running.discard(request.id)

    def _event(self, request: EngineRequest, index: int) -> TokenEvent:
        token = answer_token(request.version, len(request.prompt), request.sampling.seed or 0, index)
        last = index == request.sampling.max_tokens - 1
        asked = request.sampling.top_logprobs
        return TokenEvent(
            token,
            f"w{token} ",
            None if asked is None else -0.5,
            tuple(TokenLogprob(i, -1.0 - i) for i in range(asked or 0)),
            "length" if last else None,
        )

    def status(self) -> EngineStatus:
        """Return the state."""
        return EngineStatus(
            alive=not self.dead and not self.hangs,
            hangs=self.hangs,
            running=len(self.running),
            slots=4,
            slots_used=len(self.loaded),
            resident=(*self.loaded,),
            work=self.meter.work({"writes": 3, "row_by_row": 5}),
        )


@contextmanager
def served(service: Service, **options: Any) -> Iterator[str]:
    """Serve on a free port of this machine, and yield the address."""
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        service.templates.close()
