"""Checks the names of adapters, and reads the references to them in requests."""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.serving.serving_errors import InvalidRequestError, ModelNotFoundError

_WORD = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
_NAME = re.compile(rf"(?:{_WORD}/)?{_WORD}", re.ASCII)
_REFERENCE = re.compile(r"(?P<name>[^@]+)(?:@(?:sha256:)?(?P<prefix>[0-9a-f]{6,64}))?", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """The adapter that a request names, and the first digits of the digest where it wants one version.

    Attributes:
        name: the adapter's name, ``name`` or ``tenant/name``, or an alias.
        prefix: hexadecimal digits of the digest; empty for the current version.
    """

    name: str
    prefix: str = ""


def check_name(name: str) -> str:
    """Return a name that an adapter may have: ``name`` or ``tenant/name``, letters, digits and ``._-``.

    Raises:
        InvalidRequestError: it is none.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"{str(name)[:80]!r} cannot be an adapter's name.",
            hint="Use NAME or TENANT/NAME, each 1 to 64 letters, digits and ._- with no dot first.",
            param="name",
        )
    return name


def tenant_of(name: str) -> str:
    """Return the tenant of an adapter's name; an empty string where it has none."""
    return name.rpartition("/")[0]


def is_tenant(text: str) -> bool:
    """Tell whether names of adapters can begin with a tenant of that name."""
    return re.fullmatch(_WORD, text, re.ASCII) is not None


def read_reference(model: str) -> Reference:
    """Read ``name`` or ``name@1a2b3c``, the ``model`` of a request.

    Raises:
        ModelNotFoundError: no adapter can have that name.
    """
    match = _REFERENCE.fullmatch(model)
    if match is None:
        raise ModelNotFoundError(
            f"No model is named {model[:80]!r}.",
            hint="Give a name of GET /v1/models, or NAME@DIGEST with at least 6 digits.",
            param="model",
        )
    return Reference(match["name"], match["prefix"] or "")
