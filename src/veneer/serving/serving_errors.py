"""Defines the refusals of the server: an error for each reason, with its HTTP status and OpenAI-style code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.errors import (
    BaseMismatchError,
    EngineError,
    NotACheckpointError,
    OutputError,
    PathNotFoundError,
    SourceError,
    UsageError,
    VeneerError,
)


class ServingError(VeneerError):
    """The server refuses a request.

    Attributes:
        status: the HTTP status.
        code: the code in the body of the answer.
        retry_after: the seconds after which another try may succeed; ``None`` where none will.
        param: the field of the request that is at fault.
    """

    status: ClassVar[int] = 400
    code: ClassVar[str] = "invalid_request"

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after: float | None = None, param: str | None = None
    ) -> None:
        self.retry_after, self.param = retry_after, param
        super().__init__(message, hint=hint)


class InvalidRequestError(ServingError):
    """The body, a name or a source is not valid."""


class UnsupportedFieldError(ServingError):
    """A field of OpenAI's API that this server does not have."""

    code = "unsupported_field"


class ContextTooLongError(ServingError):
    """Prompt and answer are longer than the model or the cache."""

    code = "context_length_exceeded"


class InvalidApiKeyError(ServingError):
    """No key, an unknown key, or one that has expired."""

    status, code = 401, "invalid_api_key"


class NotAllowedError(ServingError):
    """A key lacks the scope, or a source or name is not allowed."""

    status, code = 403, "adapter_not_allowed"


class ModelNotFoundError(ServingError):
    """No adapter of that name, or none that the key may use."""

    status, code = 404, "model_not_found"


class AdapterExistsError(ServingError):
    """The name has another version, and the request does not replace it."""

    status, code = 409, "adapter_exists"


class AdapterBusyError(ServingError):
    """Requests still use the adapter."""

    status, code = 409, "adapter_busy"


class AdapterRemovedError(ServingError):
    """The adapter was removed a short time ago."""

    status, code = 410, "adapter_removed"


class AdapterTooLargeError(ServingError):
    """The adapter is above the limit of bytes or of rank."""

    status, code = 413, "adapter_too_large"


class AdapterInvalidError(ServingError):
    """The adapter cannot be served: damaged, for another base, of an unsupported kind, or quarantined."""

    status, code = 422, "adapter_invalid"


class SourceFailedError(ServingError):
    """The source of an adapter gives nothing, or its files cannot be stored."""

    status, code = 424, "adapter_source_failed"


class RateLimitedError(ServingError):
    """A key made more requests, or asked for more tokens, than it may."""

    status, code = 429, "rate_limited"


class QueueFullError(ServingError):
    """Too many requests wait, in all or for one adapter."""

    status, code = 429, "queue_full"


class EngineFailedError(ServingError):
    """A step of the engine failed."""

    status, code = 500, "engine_error"


class EngineRestartingError(ServingError):
    """The engine is being started anew."""

    status, code = 503, "engine_restarting"


class AdapterLoadingError(ServingError):
    """The adapter is not loaded yet."""

    status, code = 503, "adapter_loading"


class DrainingError(ServingError):
    """The server, or the version, takes no new requests."""

    status, code = 503, "draining"


class OverloadedError(ServingError):
    """A request waited as long as it may, and others are still before it."""

    status, code = 503, "overloaded"


class DeadlineExceededError(ServingError):
    """An answer was not complete at the request's deadline."""

    status, code = 504, "deadline_exceeded"


@dataclass(frozen=True)
class _Rule:
    error: type[VeneerError]
    refusal: type[ServingError]


# The first that an error is an instance of, in this order.
_RULES = (
    _Rule(EngineError, EngineFailedError),
    _Rule(UsageError, InvalidRequestError),
    _Rule(OutputError, SourceFailedError),
    _Rule(BaseMismatchError, AdapterInvalidError),
    _Rule(NotACheckpointError, AdapterInvalidError),
    _Rule(PathNotFoundError, SourceFailedError),
    _Rule(SourceError, AdapterInvalidError),
    _Rule(VeneerError, AdapterInvalidError),
)


def as_refusal(error: VeneerError) -> ServingError:
    """Return the refusal that an error of the library amounts to; a refusal itself."""
    if isinstance(error, ServingError):
        return error
    refusal = next(rule.refusal for rule in _RULES if isinstance(error, rule.error))
    return refusal(error.message, hint=error.hint)
