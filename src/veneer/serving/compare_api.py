"""Answers ``/v1/compare``: one prompt under several models, in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends

from veneer.serving.answer_format import Choice, Json, usage
from veneer.serving.asking import Asked, Infers, Parts, Prompt, RequestId, prompt_tokens
from veneer.serving.engine_types import TokenEvent
from veneer.serving.errors_http import error_body, refusal_of
from veneer.serving.http_guard import body_of
from veneer.serving.metrics import Measured
from veneer.serving.openai_types import CompareBody
from veneer.serving.stream import Answer, Events, Sender

routes = APIRouter()


@routes.post("/v1/compare")
async def compare(
    service: Parts, caller: Infers, id: RequestId, body: Annotated[CompareBody, Depends(body_of(CompareBody))]
) -> Answer:
    """Answer one prompt under several models, in one batch."""

    async def work(sender: Sender) -> None:
        asked = Asked(service, caller, body, id)
        with asked.held:
            for model in body.models:
                use = asked.use(model)
                tokens = await prompt_tokens(service, caller, use, body)
                most = service.most_tokens(len(tokens), body.max_tokens)
                asked.prompts.append(Prompt(use, tokens, body.sampling(most, None)))
            async with asked.generations() as generations:
                columns = ComparedAnswers(asked, body.models)
                send = _stream_columns if body.stream else _whole_columns
                await send(columns, generations.events(), sender)

    return Answer(work)


class ComparedAnswers:
    """The answers of a comparison, each with its version and its times."""

    def __init__(self, asked: Asked, models: Sequence[str]) -> None:
        self.asked, self._models = asked, models
        self._choices = [Choice() for _ in models]
        begin = time.monotonic()
        self._times = [Measured(begin) for _ in models]
        self.errors: dict[int, Exception] = {}

    def head(self, index: int) -> Json:
        """Return what begins a column."""
        prompt = self.asked.prompts[index]
        return {
            "index": index,
            "model": self._models[index],
            "adapter": prompt.use.label,
            "system_fingerprint": self.asked.fingerprint(prompt.use),
        }

    def add(self, item: tuple[int, TokenEvent | Exception]) -> Json | None:
        """Add an event, and return what a stream tells of it."""
        index, event = item
        if isinstance(event, Exception):
            self.errors[index] = event
            return {"index": index, **error_body(refusal_of(event))}
        self._times[index].add(event)
        self._choices[index].add(event)
        if event.finish is not None:
            return {"index": index, "text": event.text, **self._end(index)}
        return {"index": index, "text": event.text} if event.text else None

    def whole(self, index: int) -> Json:
        """Return a whole column."""
        if index in self.errors:
            return {**self.head(index), **error_body(refusal_of(self.errors[index]))}
        return {**self.head(index), "text": self._choices[index].text, **self._end(index)}

    def _end(self, index: int) -> Json:
        choice, prompt, times = self._choices[index], self.asked.prompts[index], self._times[index]
        first = (times.first or times.arrival) - times.arrival
        rate = 1 / times.token_seconds if times.token_seconds else None
        return {
            "finish_reason": choice.finish,
            "usage": usage(len(prompt.tokens), choice.tokens),
            "timing": {"first_token_seconds": first, "tokens_per_second": rate},
        }


async def _whole_columns(columns: ComparedAnswers, events: Events, sender: Sender) -> None:
    async for item in events:
        if item is not None:
            columns.add(item)
    body = [columns.whole(index) for index in range(len(columns.asked.prompts))]
    await sender.json({"object": "compare", "columns": body}, columns.asked.header())


async def _stream_columns(columns: ComparedAnswers, events: Events, sender: Sender) -> None:
    await sender.begin_events(columns.asked.header())
    try:
        for index in range(len(columns.asked.prompts)):
            await sender.event(columns.head(index))
        async for item in events:
            if item is None:
                await sender.heartbeat()
                continue
            event = columns.add(item)
            if event is not None:
                await sender.event(event)
    except Exception as error:
        await sender.end_events(error)
        return
    await sender.end_events(next(iter(columns.errors.values()), None))
