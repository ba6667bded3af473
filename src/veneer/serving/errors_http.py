"""Turns errors into answers of HTTP: a status, and OpenAI's error body with our hint in its message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from veneer.errors import VeneerError
from veneer.printing import printable
from veneer.serving.serving_errors import InvalidRequestError, ServingError, UnsupportedFieldError, as_refusal

# Status -> OpenAI's type of error; for another, by its first digit.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    410: "not_found_error",
    429: "rate_limit_error",
}
# Parts of the place of a problem that name an alternative of pydantic's, and no field.
_ALTERNATIVES = {"str", "int", "float", "bool"}


class NotFoundError(ServingError):
    """There is no such address."""

    status, code = 404, "not_found"


class MethodNotAllowedError(ServingError):
    """The address does not take this method."""

    status, code = 405, "method_not_allowed"


class RequestTimeoutError(ServingError):
    """The client did not send its request in time."""

    status, code = 408, "request_timeout"


class BodyTooLargeError(ServingError):
    """The body has more bytes than the server reads."""

    status, code = 413, "body_too_large"


class WrongContentTypeError(ServingError):
    """The body is not declared to be JSON."""

    status, code = 415, "wrong_content_type"


class HostNotAllowedError(ServingError):
    """A page of another site sent the request, or a name that stands for this machine only now."""

    status, code = 403, "host_not_allowed"


class InternalServerError(ServingError):
    """The server itself failed."""

    status, code = 500, "internal_error"


def refusal_of(error: Exception) -> ServingError:
    """Return the refusal that an exception becomes; what nobody raised on purpose tells nothing of itself."""
    if isinstance(error, ValidationError):
        return invalid_body(error)
    if isinstance(error, VeneerError):
        return as_refusal(error)
    return InternalServerError("The server failed.", hint="Its log says why, under this answer's x-request-id.")


def invalid_body(error: ValidationError) -> ServingError:
    """Return the refusal of a body that does not validate: all unknown fields by name, or the first wrong one."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = list(dict.fromkeys(_unknown(p["loc"]) for p in problems if p["type"] == "extra_forbidden"))
    if unknown:
        names, verb = ", ".join(f"`{name}`" for name in unknown), "is" if len(unknown) == 1 else "are"
        hint = "Leave it out: this server ignores no field."
        return UnsupportedFieldError(f"{names} {verb} not supported here.", hint=hint, param=unknown[0])
    problem = problems[0]
    field = _field(problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return InvalidRequestError(f"`{field}`: {message}." if field else f"{message}.", param=field or None)


def _field(place: Sequence[int | str]) -> str:
    """Return the place of a problem, such as ``messages[0].content``."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _ALTERNATIVES and not any(mark in part for mark in "[(-"):
            text += f".{part}" if text else part
    return text[:200]


def _unknown(place: Sequence[int | str]) -> str:
    """Return the place of a field that is not known, whatever its name is."""
    return printable(".".join(filter(None, (_field(place[:-1]), str(place[-1]))))[:200])


def error_body(refusal: ServingError) -> dict[str, Any]:
    """Return OpenAI's error body."""
    kind = _TYPES.get(refusal.status) or ("server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}


def error_response(refusal: ServingError) -> JSONResponse:
    """Return the answer that tells a refusal."""
    headers = {} if refusal.retry_after is None else {"retry-after": str(max(1, math.ceil(refusal.retry_after)))}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(refusal), refusal.status, headers)
