"""Puts the routes together into the application, and answers what is neither inference nor adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from veneer.serving import adapters_api, api, compare_api, models_api
from veneer.serving.asking import Parts, caller_with
from veneer.serving.auth import Caller
from veneer.serving.errors_http import MethodNotAllowedError, NotFoundError, error_response
from veneer.serving.http_guard import Guard
from veneer.serving.service import Service
from veneer.serving.serving_errors import InvalidRequestError

routes = APIRouter()
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/events.js": ("events.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(service: Service) -> FastAPI:
    """Return the application that serves over HTTP what a service has.

    The caller starts the engine and opens the registry, then says ``service.ready = True``; the application closes
    neither.
    """
    # The pages of documentation that FastAPI makes load scripts from elsewhere.
    app = FastAPI(title="veneer serve", openapi_url=None, docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.state.service = service
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_query)
    for part in (routes, api.routes, compare_api.routes, models_api.routes, adapters_api.routes):
        app.include_router(part)
    if service.settings.page:
        for address, (name, content_type) in _PAGE.items():
            app.add_api_route(address, _file(name, content_type), methods=["GET"])
    if service.settings.metrics_port is not None:
        app.add_middleware(MetricsPort, port=service.settings.metrics_port)
    app.add_middleware(Guard, on_answer=service.metrics.answered, hosts=service.settings.hosts)
    return app


class MetricsPort:
    """Answers ``/metrics`` on a port of its own, and everything else on the others."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it where its address is not on this port."""
        if scope["type"] == "http" and (scope["path"] == "/metrics") != (scope["server"][1] == self._port):
            raise _no_address(f"{scope['method']} {scope['path'][:200]}")
        await self._app(scope, receive, send)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.service.drain()


def _http_error(request: Request, error: Exception) -> Response:
    """Answer what the router itself refuses."""
    status = getattr(error, "status_code", 400)
    where = f"{request.method} {request.url.path[:200]}"
    if status == 404:
        return error_response(_no_address(where))
    if status == 405:
        refusal = MethodNotAllowedError(f"{where} is not taken.", hint="docs/serve-api.md lists the addresses.")
        response = error_response(refusal)
        response.headers.update(getattr(error, "headers", None) or {})  # which methods it takes
        return response
    return error_response(InvalidRequestError(str(getattr(error, "detail", "The request is not valid."))))


def _no_address(where: str) -> NotFoundError:
    return NotFoundError(f"There is no {where}.", hint="docs/serve-api.md lists the addresses.")


def _invalid_query(request: Request, error: Exception) -> Response:
    """Answer a wrong value behind the question mark."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    field = str(problem["loc"][-1])
    return error_response(InvalidRequestError(f"`{field}`: {problem['msg']}.", param=field))


def _file(name: str, content_type: str) -> Callable[[], Awaitable[Response]]:
    data = resources.files("veneer.serving").joinpath("page", name).read_bytes()

    async def page() -> Response:
        return Response(data, headers=_PAGE_HEADERS, media_type=content_type)

    return page


@routes.api_route("/health", methods=["GET", "HEAD"])
async def health(service: Parts) -> Response:
    """Tell whether the engine lives; never waits for it."""
    status = service.engine.status()
    if status.alive:
        return JSONResponse({"status": "ok", "restarts": status.restarts})
    return JSONResponse({"status": "dead", "restarts": status.restarts}, 503)


@routes.api_route("/ready", methods=["GET", "HEAD"])
async def ready(service: Parts) -> Response:
    """Tell whether new requests are taken."""
    state = "draining" if service.draining else "ready" if service.ready else "starting"
    taken = state == "ready" and service.engine.status().alive
    return JSONResponse({"status": state}, 200 if taken else 503)


@routes.get("/metrics")
async def metrics(service: Parts, caller: Annotated[Caller, Depends(caller_with("metrics", "admin"))]) -> Response:
    """Return the metrics for Prometheus."""
    return Response(service.metrics.text(service), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
