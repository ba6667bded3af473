"""Reads the file of API keys, and tells who a caller is and what he may do."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, UsageError
from veneer.files.json_file import read_json
from veneer.serving.adapter_names import is_tenant, tenant_of
from veneer.serving.serving_errors import InvalidApiKeyError, NotAllowedError

SCOPES = ("infer", "admin", "metrics")
_MAKE = "`veneer serve --new-key` makes a key and its line for the file."


@dataclass(frozen=True)
class Caller:
    """A caller, and what he may do.

    Attributes:
        id: the key's name in the file, never the key.
        tenant: whose adapters he manages; an empty string for all.
        scopes: of ``infer``, ``admin``, ``metrics``.
        adapters: globs of the names that he may use.
        requests_per_minute, tokens_per_minute: his rates; ``None`` for no limit.
        running: the most requests that he may have in the engine.
        expires: seconds since the epoch.
    """

    id: str
    tenant: str = ""
    scopes: frozenset[str] = frozenset(SCOPES)
    adapters: tuple[str, ...] = ("*",)
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    running: int | None = None
    expires: float | None = None

    def may_use(self, name: str) -> bool:
        """Tell whether he may use an adapter, or the base, of that name."""
        return any(fnmatchcase(name, glob) for glob in self.adapters)

    def may_manage(self, name: str) -> bool:
        """Tell whether he may register and remove an adapter of that name."""
        return "admin" in self.scopes and self.may_use(name) and self.tenant in ("", tenant_of(name))

    def check_scope(self, scope: str) -> None:
        """Raise ``NotAllowedError`` where he lacks a scope."""
        if scope not in self.scopes:
            raise NotAllowedError(f"The key {self.id} has no scope {scope!r}.", hint="Use a key that has it.")


# Everybody, where the server has no file of keys; the operator when it starts.
ANONYMOUS = Caller("anonymous")


class Keys:
    """Holds the keys of a file, by their hashes; without a file everybody is :data:`ANONYMOUS`.

    The file is JSON: ``{"keys": [{"id", "sha256", "tenant", "scopes", "adapters", "requests_per_minute",
    "tokens_per_minute", "running", "expires"}]}``; all but the first two may be left out.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._callers: dict[bytes, Caller] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again; where it is damaged, the keys stay as they were.

        Raises:
            SourceError, ConfigError: the file cannot be read, or says what is no key.
        """
        if self._path is not None:
            self._callers = _read(self._path)

    def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller of a request.

        Args:
            authorization: the header of that name, ``Bearer KEY``.

        Raises:
            InvalidApiKeyError: there is no key, no such key, or it has expired.
        """
        if self._path is None:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise InvalidApiKeyError("No API key was given.", hint="Send the header `Authorization: Bearer KEY`.")
        caller = self._find(key.strip())
        if caller is None:
            raise InvalidApiKeyError("The API key is not known.", hint="Ask the operator for a key.")
        if caller.expires is not None and self._clock() >= caller.expires:
            raise InvalidApiKeyError(f"The API key {caller.id} has expired.", hint="Ask the operator for a new key.")
        return caller

    def _find(self, key: str) -> Caller | None:
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None


def new_key(name: str) -> tuple[str, dict[str, Any]]:
    """Make a key: the key itself, which is shown once, and what stands for it in the file."""
    key = f"vk-{secrets.token_urlsafe(32)}"
    return key, {"id": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": ["infer"], "adapters": ["*"]}


def _read(path: Path) -> dict[bytes, Caller]:
    entries = read_json(path).get("keys")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{path}: there is no list "keys" with at least one key.', hint=_MAKE)
    callers: dict[bytes, Caller] = {}
    for number, entry in enumerate(entries, 1):
        digest, caller = _Entry(f"{path}: key {number}", entry).read()
        if digest in callers or any(caller.id == known.id for known in callers.values()):
            raise ConfigError(f"{path}: key {number} ({caller.id}) is there twice.", hint="Remove one of the two.")
        callers[digest] = caller
    return callers


@dataclass(frozen=True)
class _Entry:
    """Reads one key of the file, and says which field of it is wrong."""

    where: str
    values: Any

    def read(self) -> tuple[bytes, Caller]:
        known = {"id", "sha256", "tenant", "scopes", "adapters", "requests_per_minute", "tokens_per_minute", "running"}
        if not isinstance(self.values, Mapping):
            raise self.wrong("is no object")
        unknown = sorted(self.values.keys() - known - {"expires"})
        if unknown:
            raise self.wrong(f"has the unknown field {unknown[0]!r}")
        return self.digest(), Caller(
            id=self.text("id", None),
            tenant=self.tenant(),
            scopes=frozenset(self.texts("scopes", ("infer",), SCOPES)),
            adapters=self.texts("adapters", ("*",)),
            requests_per_minute=self.number("requests_per_minute"),
            tokens_per_minute=self.number("tokens_per_minute"),
            running=self.count("running"),
            expires=self.time("expires"),
        )

    def wrong(self, what: str) -> UsageError:
        return UsageError(f"{self.where} {what}.", hint=_MAKE)

    def digest(self) -> bytes:
        try:
            digest = bytes.fromhex(self.values["sha256"])
        except (KeyError, TypeError, ValueError):
            digest = b""
        if len(digest) != 32:
            raise self.wrong('needs "sha256", the 64 hexadecimal digits of the key\'s SHA-256')
        return digest

    def text(self, field: str, default: str | None) -> str:
        value = self.values.get(field, default)
        if not isinstance(value, str) or (default is None and not value):
            raise self.wrong(f"needs a text as {field!r}")
        return value

    def tenant(self) -> str:
        tenant = self.text("tenant", "")
        if tenant and not is_tenant(tenant):
            raise self.wrong(f"has the tenant {tenant!r}, which cannot begin an adapter's name")
        return tenant

    def texts(self, field: str, default: tuple[str, ...], choices: tuple[str, ...] = ()) -> tuple[str, ...]:
        values = self.values.get(field, default)
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) and value for value in values):
            raise self.wrong(f"needs a list of texts as {field!r}")
        odd = [value for value in values if choices and value not in choices]
        if odd:
            raise self.wrong(f"has {odd[0]!r} in {field!r}, and only {', '.join(choices)} are there")
        return tuple(values)

    def number(self, field: str) -> float | None:
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.wrong(f"needs a number above 0 as {field!r}")
        return float(value)

    def count(self, field: str) -> int | None:
        value = self.number(field)
        if value is not None and value != int(value):
            raise self.wrong(f"needs a whole number as {field!r}")
        return None if value is None else int(value)

    def time(self, field: str) -> float | None:
        value = self.values.get(field)
        if value is None:
            return None
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except (AttributeError, ValueError) as error:
            raise self.wrong(f"needs a time such as 2027-01-31T00:00:00Z as {field!r}") from error
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
