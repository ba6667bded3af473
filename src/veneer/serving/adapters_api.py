"""Answers the routes that register, list and remove adapters, under our names and under vLLM's."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.responses import JSONResponse, PlainTextResponse, Response

from veneer.serving.asking import Parts, caller_with
from veneer.serving.auth import Caller
from veneer.serving.http_guard import body_of
from veneer.serving.openai_types import AliasBody, LoadLoraBody, RegistrationBody, RollbackBody, UnloadLoraBody
from veneer.serving.registry_types import AdapterInfo, Registration, VersionInfo
from veneer.serving.service import Service
from veneer.serving.serving_errors import (
    AdapterExistsError,
    AdapterInvalidError,
    AdapterRemovedError,
    DrainingError,
    ModelNotFoundError,
    NotAllowedError,
)

routes = APIRouter()
Manages = Annotated[Caller, Depends(caller_with("admin"))]
Json = dict[str, Any]


def _changing(service: Service) -> None:
    """Check that adapters may come and go while the server runs."""
    if not service.settings.runtime_adapters:
        raise NotAllowedError(
            "This server's adapters are those that it was started with.",
            hint="Start it with --allow-runtime-adapters, and with --allow-source for each place they may come from.",
        )
    if service.draining:
        raise DrainingError("This server is being stopped.", hint="Ask another.", retry_after=5)


@routes.post("/v1/adapters")
async def register(
    service: Parts,
    caller: Manages,
    body: Annotated[RegistrationBody, Depends(body_of(RegistrationBody))],
) -> Response:
    """Register an adapter; 202 while it goes on in the background, 201 when it is ready."""
    _changing(service)
    registration = Registration(**body.model_dump(exclude={"wait"}))
    if not body.wait:
        return JSONResponse(adapter_json(service.registry.begin(registration, caller)), 202)
    return JSONResponse(adapter_json(await service.registry.register(registration, caller)), 201)


@routes.get("/v1/adapters")
async def adapters(service: Parts, caller: Manages) -> Json:
    """List the states of all adapters that the caller may use."""
    rows = [adapter_json(info) for info in service.registry.adapters(caller)]
    return {"object": "list", "data": rows, "changeable": service.settings.runtime_adapters}


@routes.get("/v1/adapters/{name:path}")
async def adapter(service: Parts, caller: Manages, name: str) -> Json:
    """Return the state of one adapter, and the tokenizer and chat template that it is served with."""
    info = service.registry.adapter(name, caller)
    return {**adapter_json(info), **await asyncio.to_thread(_tokenizer_json, service, info)}


@routes.delete("/v1/adapters/{name:path}")
async def remove(
    service: Parts,
    caller: Manages,
    name: str,
    drain: Annotated[float | None, Query(ge=0, le=3600)] = None,
    force: bool = False,
) -> Response:
    """Remove an adapter; 202 while requests still use it."""
    _changing(service)
    gone = await service.registry.remove(name, caller, drain=drain, force=force)
    return Response(status_code=204) if gone else JSONResponse({"name": name, "state": "draining"}, 202)


@routes.post("/v1/adapters/{name:path}/pin")
async def pin(service: Parts, caller: Manages, name: str) -> Json:
    """Keep an adapter loaded and stored."""
    return adapter_json(service.registry.pin(name, caller))


@routes.post("/v1/adapters/{name:path}/unpin")
async def unpin(service: Parts, caller: Manages, name: str) -> Json:
    """End that an adapter is kept."""
    return adapter_json(service.registry.pin(name, caller, pinned=False))


@routes.post("/v1/adapters/{name:path}/warm")
async def warm(service: Parts, caller: Manages, name: str) -> Json:
    """Load an adapter into the engine before it is asked for."""
    return adapter_json(await service.registry.warm(name, caller))


@routes.post("/v1/adapters/{name:path}/rollback")
async def rollback(
    service: Parts,
    caller: Manages,
    name: str,
    body: Annotated[RollbackBody, Depends(body_of(RollbackBody))],
) -> Json:
    """Move a name back to its previous version, or to the one whose digest begins so."""
    _changing(service)
    to = None if body.to is None else body.to.removeprefix("sha256:")
    return adapter_json(await service.registry.rollback(name, caller, to=to))


@routes.post("/v1/adapters/{name:path}/alias")
async def alias(
    service: Parts, caller: Manages, name: str, body: Annotated[AliasBody, Depends(body_of(AliasBody))]
) -> Json:
    """Give an adapter another name; an alias that is there already moves."""
    _changing(service)
    return adapter_json(service.registry.alias(body.alias, name, caller))


@routes.post("/v1/load_lora_adapter")
async def load_lora_adapter(
    service: Parts, caller: Manages, body: Annotated[LoadLoraBody, Depends(body_of(LoadLoraBody))]
) -> Response:
    """Register an adapter, as clients of vLLM do."""
    _changing(service)
    name = body.lora_name
    if body.base_model_name not in (None, service.settings.base_name):
        return _as_vllm(404, "NotFoundError", f"The base of this server is {service.settings.base_name}.")
    try:
        # There, the same name is an error even where the bytes are the same.
        if not body.load_inplace and _is_there(service, caller, name):
            raise AdapterExistsError(name)
        await service.registry.register(Registration(name, body.lora_path, replace=body.load_inplace), caller)
    except AdapterExistsError:
        message = f"The lora adapter '{name}' has already been loaded; 'load_inplace' replaces it."
        return _as_vllm(400, "InvalidUserInput", message)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


def _is_there(service: Service, caller: Caller, name: str) -> bool:
    try:
        return service.registry.adapter(name, caller).current is not None
    except (ModelNotFoundError, AdapterRemovedError):
        return False


@routes.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(
    service: Parts, caller: Manages, body: Annotated[UnloadLoraBody, Depends(body_of(UnloadLoraBody))]
) -> Response:
    """Remove an adapter, as clients of vLLM do: requests under way are finished first."""
    _changing(service)
    try:
        await service.registry.remove(body.lora_name, caller, drain=0)
    except (ModelNotFoundError, AdapterRemovedError):
        return _as_vllm(404, "NotFoundError", f"The lora adapter '{body.lora_name}' cannot be found.")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _as_vllm(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def adapter_json(info: AdapterInfo) -> Json:
    """Return what the API tells of an adapter."""
    adapter = info.adapter
    return {
        "name": info.name,
        "state": info.state.value,
        "version": info.current and info.current.number,
        "digest": info.current and info.current.digest,
        "versions": [_version_json(version) for version in info.versions],
        "method": adapter and adapter.method,
        "rank": adapter and adapter.rank,
        "bytes": adapter and adapter.nbytes,
        "memory_bytes": info.memory_bytes,
        "files": list(adapter.files) if adapter else [],
        "aliases": list(info.aliases),
        "pinned": info.pinned,
        "resident": info.resident,
        "requests": info.leases,
        "last_used": info.last_used,
        "error": info.error,
        "hint": info.hint,
        "load_seconds": dict(info.load_seconds),
    }


def _tokenizer_json(service: Service, info: AdapterInfo) -> Json:
    """Return whose tokenizer and chat template an adapter is served with; reads its files."""
    if info.adapter is None:
        return {"tokenizer": None, "chat_template": None, "tokenizer_unfit": None}
    try:
        choice = service.tokenizer.choice(info.adapter.folder)
    except AdapterInvalidError as error:
        return {"tokenizer": None, "chat_template": None, "tokenizer_unfit": error.message}
    return {"tokenizer": choice.tokenizer, "chat_template": choice.chat_template, "tokenizer_unfit": choice.unfit}


def _version_json(version: VersionInfo) -> Json:
    return {**asdict(version), "state": version.state.value}
