"""Holds what a request needs while it is answered: its caller, its versions, its prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, Request

from veneer._version import __version__
from veneer.serving.auth import Caller
from veneer.serving.engine_types import Sampling
from veneer.serving.openai_types import ChatMessage, PromptBody, SamplingBody
from veneer.serving.prompt_tokens import PromptTokenizer, own_template
from veneer.serving.registry_types import Use
from veneer.serving.service import Service
from veneer.serving.serving_errors import DrainingError, NotAllowedError
from veneer.serving.stream import Generations
from veneer.serving.template_process import TemplateInput

ADAPTER_HEADER = "x-veneer-adapter"
# ASCII that a header carries as it is, but for the sign of the encoding and the comma between two names.
_IN_HEADERS = " !#$&'()*+/:;=?@[]"


def service_of(request: Request) -> Service:
    """Return the server's parts."""
    service: Service = request.app.state.service
    return service


def caller_with(*scopes: str) -> Callable[[Request], Awaitable[Caller]]:
    """Return a dependency that tells who calls, and refuses a caller who has none of some scopes."""

    async def caller(request: Request) -> Caller:
        caller = service_of(request).keys.authenticate(request.headers.get("authorization"))
        if not caller.scopes.intersection(scopes):
            wanted = " or ".join(repr(scope) for scope in scopes)
            raise NotAllowedError(f"The key {caller.id} has no scope {wanted}.", hint="Use a key that has it.")
        return caller

    return caller


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


Parts = Annotated[Service, Depends(service_of)]
RequestId = Annotated[str, Depends(_request_id)]
Infers = Annotated[Caller, Depends(caller_with("infer"))]


@dataclass(frozen=True)
class Prompt:
    """A prompt, the version that continues it, and how."""

    use: Use
    tokens: tuple[int, ...]
    sampling: Sampling


@dataclass
class Asked:
    """A request with all that its answer needs; closed, it gives its versions back."""

    service: Service
    caller: Caller
    body: SamplingBody
    request_id: str
    prompts: list[Prompt] = field(default_factory=list)
    held: ExitStack = field(default_factory=ExitStack)

    def use(self, model: str) -> Use:
        """Hold the version that a model's name means now."""
        if self.service.draining:
            raise DrainingError("This server is being stopped.", hint="Ask another.", retry_after=5)
        return self.held.enter_context(self.service.registry.use(model, self.caller))

    def generations(self) -> Generations:
        """Begin to generate the answers to all prompts."""
        self.service.tokenizer.check_bias(int(token) for token in self.body.logit_bias)
        limit = self.service.settings.request_timeout
        timeout = limit if self.body.timeout is None else min(self.body.timeout, limit)
        sources = [self.service.answer(p.use, self.caller, p.tokens, p.sampling, self.request_id) for p in self.prompts]
        return Generations(sources, timeout)

    def fingerprint(self, use: Use) -> str:
        """Return what OpenAI calls the system's fingerprint."""
        base, adapter = (_digits(digest) for digest in (self.service.settings.base_digest, use.digest))
        return "-".join(part for part in (base, adapter, __version__) if part)

    def header(self) -> dict[str, str]:
        """Return the header that names the versions which answer, percent-encoded: a base may have any name."""
        labels = dict.fromkeys(quote(prompt.use.label, safe=_IN_HEADERS) for prompt in self.prompts)
        return {ADAPTER_HEADER: ", ".join(labels)}


def _digits(digest: str | None) -> str:
    return (digest or "").rpartition(":")[2][:8]


async def tokenizer_of(service: Service, use: Use) -> PromptTokenizer:
    """Return the tokenizer of the version that answers."""
    if use.adapter is None:
        return service.tokenizer
    return await asyncio.to_thread(service.tokenizer.of, use.adapter.folder)


async def chat_tokens(
    service: Service,
    caller: Caller,
    use: Use,
    messages: Sequence[ChatMessage],
    options: dict[str, Any],
    generation_prompt: bool = True,
) -> tuple[int, ...]:
    """Return the tokens of a conversation, under the adapter's own chat template where it brings one."""
    tokenizer = await tokenizer_of(service, use)
    template = None if use.adapter is None else await asyncio.to_thread(own_template, use.adapter.folder)
    rows = [message.for_template() for message in messages]
    if template is None:
        return await asyncio.to_thread(tokenizer.chat, rows, options, generation_prompt)
    chat = TemplateInput(template, rows, tokenizer.template_variables(options), generation_prompt)
    text = await service.templates.render(chat, caller.id)
    return await asyncio.to_thread(tokenizer.text, text, False, "messages")


async def text_tokens(
    service: Service, use: Use, prompt: str | list[int], special_tokens: bool = True
) -> tuple[int, ...]:
    """Return the tokens of a prompt that is a text, or its tokens."""
    if isinstance(prompt, str):
        tokenizer = await tokenizer_of(service, use)
        return await asyncio.to_thread(tokenizer.text, prompt, special_tokens)
    return service.tokenizer.checked(prompt)


async def prompt_tokens(
    service: Service,
    caller: Caller,
    use: Use,
    body: PromptBody,
    generation_prompt: bool = True,
    special_tokens: bool = True,
) -> tuple[int, ...]:
    """Return the tokens of a body's chat, or of its text."""
    if body.messages is None:
        return await text_tokens(service, use, body.prompt or "", special_tokens)
    return await chat_tokens(service, caller, use, body.messages, body.chat_template_kwargs, generation_prompt)
