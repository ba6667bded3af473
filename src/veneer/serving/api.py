"""Answers OpenAI's two routes of inference."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends

from veneer.serving.answer_format import AnswerFormat, ChatFormat, Choice, CompletionFormat, Json, usage
from veneer.serving.asking import Asked, Infers, Parts, Prompt, RequestId, chat_tokens, text_tokens, tokenizer_of
from veneer.serving.engine_types import TokenEvent
from veneer.serving.http_guard import body_of
from veneer.serving.openai_types import ChatBody, CompletionBody, StreamingBody
from veneer.serving.stream import Answer, Events, Sender, event_of

_COMPLETION_TOKENS = 16  # OpenAI's default for completions
routes = APIRouter()


@routes.post("/v1/chat/completions")
async def chat_completions(
    service: Parts, caller: Infers, id: RequestId, body: Annotated[ChatBody, Depends(body_of(ChatBody))]
) -> Answer:
    """Continue a conversation."""

    async def prepare(asked: Asked) -> AnswerFormat:
        use = asked.use(body.model)
        tokens = await chat_tokens(service, caller, use, body.messages, body.chat_template_kwargs)
        most = service.most_tokens(len(tokens), body.limit)
        asked.prompts += [Prompt(use, tokens, body.sampling(most, body.alternatives, i)) for i in range(body.n)]
        tokenizer = await tokenizer_of(service, use)
        return ChatFormat(body.model, asked.fingerprint(use), tokenizer.token_text, body.logprobs)

    return _answer(Asked(service, caller, body, id), body, prepare)


@routes.post("/v1/completions")
async def completions(
    service: Parts, caller: Infers, id: RequestId, body: Annotated[CompletionBody, Depends(body_of(CompletionBody))]
) -> Answer:
    """Continue texts."""

    async def prepare(asked: Asked) -> AnswerFormat:
        use = asked.use(body.model)
        for prompt in body.prompts:
            tokens = await text_tokens(service, use, prompt)
            most = service.most_tokens(len(tokens), body.max_tokens, _COMPLETION_TOKENS)
            asked.prompts += [Prompt(use, tokens, body.sampling(most, body.logprobs, i)) for i in range(body.n)]
        tokenizer = await tokenizer_of(service, use)
        return CompletionFormat(body.model, asked.fingerprint(use), tokenizer.token_text, body.logprobs is not None)

    return _answer(Asked(service, caller, body, id), body, prepare)


Prepare = Callable[[Asked], Awaitable[AnswerFormat]]


def _answer(asked: Asked, body: StreamingBody, prepare: Prepare) -> Answer:
    """Return the answer of one of OpenAI's two routes, which differ in their prompts and their form."""

    async def work(sender: Sender) -> None:
        with asked.held:
            form = await prepare(asked)
            async with asked.generations() as generations:
                send = _stream if body.stream else _whole
                await send(asked, form, generations.events(), sender)

    return Answer(work)


async def _whole(asked: Asked, form: AnswerFormat, events: Events, sender: Sender) -> None:
    choices = [Choice() for _ in asked.prompts]
    async for item in events:
        if item is not None:
            choices[item[0]].add(event_of(item))
    body = form.head(uuid.uuid4().hex, whole=True)
    body["choices"] = [form.whole(index, choice) for index, choice in enumerate(choices)]
    await sender.json({**body, "usage": _usage(asked, choices)}, asked.header())


def _usage(asked: Asked, choices: Sequence[Choice]) -> Json:
    """Return the count of tokens; those of a prompt once, however many answers it has."""
    prompts = {id(prompt.tokens): len(prompt.tokens) for prompt in asked.prompts}
    return usage(sum(prompts.values()), sum(choice.tokens for choice in choices))


async def _stream(asked: Asked, form: AnswerFormat, events: Events, sender: Sender) -> None:
    # The status is decided by what comes first: an error, or a token; a long wait counts as good.
    first = await anext(events)
    if first is not None:
        event_of(first)
    await sender.begin_events(asked.header())
    chunks = _Chunks(asked, form, sender)
    try:
        await chunks.begin()
        await chunks.add(first)
        async for item in events:
            await chunks.add(item)
        await chunks.end()
    except Exception as error:
        await sender.end_events(error)


class _Chunks:
    """Sends the chunks of a stream."""

    def __init__(self, asked: Asked, form: AnswerFormat, sender: Sender) -> None:
        self._asked, self._form, self._sender = asked, form, sender
        self._choices = [Choice() for _ in asked.prompts]
        self._head = form.head(uuid.uuid4().hex, whole=False)
        body = asked.body
        self._with_usage = isinstance(body, StreamingBody) and body.stream_options.include_usage

    async def begin(self) -> None:
        for index in range(len(self._choices)):
            await self._send(self._form.first(index))

    async def add(self, item: tuple[int, TokenEvent | Exception] | None) -> None:
        if item is None:
            await self._sender.heartbeat()
            return
        index, event = item[0], event_of(item)
        choice = self._choices[index]
        choice.add(event)
        await self._send(self._form.delta(index, choice, event))
        if event.finish is not None:
            await self._send(self._form.last(index, event.finish))

    async def end(self) -> None:
        if self._with_usage:
            await self._sender.event({**self._head, "choices": [], "usage": _usage(self._asked, self._choices)})
        await self._sender.end_events()

    async def _send(self, choice: Json | None) -> None:
        if choice is not None:
            usage = {"usage": None} if self._with_usage else {}
            await self._sender.event({**self._head, "choices": [choice], **usage})
