"""Answers the routes that list models, and those of the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from veneer.serving.asking import Infers, Parts, prompt_tokens, tokenizer_of
from veneer.serving.auth import Caller
from veneer.serving.http_guard import body_of
from veneer.serving.openai_types import DetokenizeBody, TokenizeBody
from veneer.serving.registry_types import AdapterInfo, State, Use
from veneer.serving.service import Service
from veneer.serving.serving_errors import ModelNotFoundError

routes = APIRouter()
Json = dict[str, Any]


@routes.get("/v1/models")
async def models(service: Parts, caller: Infers) -> Json:
    """List the base and the adapters that the caller may use."""
    base = [_base(service)] if caller.may_use(service.settings.base_name) else []
    adapters = [_model(service, info) for info in service.registry.adapters(caller) if info.current is not None]
    return {"object": "list", "data": [*base, *adapters]}


@routes.get("/v1/models/{name:path}")
async def model(service: Parts, caller: Infers, name: str) -> Json:
    """Return one model."""
    if name == service.settings.base_name and caller.may_use(name):
        return _base(service)
    info = service.registry.adapter(name, caller)
    if info.current is None:
        raise ModelNotFoundError(
            f"The adapter {name} is not ready.", hint="GET /v1/adapters/NAME tells its state.", param="model"
        )
    return _model(service, info)


def _base(service: Service) -> Json:
    settings = service.settings
    state = {"digest": settings.base_digest or None, "state": State.READY.value}
    return _entry(service, settings.base_name, 0, settings.base_name, None, state)


def _model(service: Service, info: AdapterInfo) -> Json:
    version, adapter = info.current, info.adapter
    assert version is not None
    details = {
        "digest": version.digest,
        "version": version.number,
        "state": info.state.value,
        "method": adapter and adapter.method,
        "rank": adapter and adapter.rank,
        "aliases": list(info.aliases),
    }
    return _entry(service, info.name, int(version.created), version.source, service.settings.base_name, details)


def _entry(service: Service, name: str, created: int, root: str, parent: str | None, details: Json) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "veneer",
        "root": root,
        "parent": parent,
        "max_model_len": service.engine.max_context,
        "veneer": details,
    }


@contextmanager
def _use(service: Service, caller: Caller, model: str | None) -> Iterator[Use]:
    """Hold the version whose tokenizer is asked for; without a name the base's, which any caller may ask for."""
    if model is None:
        yield Use(service.settings.base_name, None, None)
        return
    with service.registry.use(model, caller) as use:
        yield use


@routes.post("/tokenize")
async def tokenize(
    service: Parts, caller: Infers, body: Annotated[TokenizeBody, Depends(body_of(TokenizeBody))]
) -> Json:
    """Return the tokens of a text or a conversation."""
    with _use(service, caller, body.model) as use:
        tokens = await prompt_tokens(service, caller, use, body, body.add_generation_prompt, body.add_special_tokens)
    return {"count": len(tokens), "max_model_len": service.engine.max_context, "tokens": tokens}


@routes.post("/detokenize")
async def detokenize(
    service: Parts, caller: Infers, body: Annotated[DetokenizeBody, Depends(body_of(DetokenizeBody))]
) -> Json:
    """Return the text of tokens."""
    with _use(service, caller, body.model) as use:
        tokenizer = await tokenizer_of(service, use)
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}
