"""Reads what a registration names as its source, and decides whether it may be fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from veneer.files.hub_page import is_hub_page, read_hub_page
from veneer.files.lookup_options import LookupOptions
from veneer.files.paths import exists
from veneer.files.resolve import looks_like_hub_id
from veneer.serving.adapter_names import tenant_of
from veneer.serving.registry_types import Registration
from veneer.serving.serving_errors import InvalidRequestError, NotAllowedError
from veneer.serving.source_files import AdapterSource, FolderSource, HubSource, RemoteSource

_HUB = re.compile(r"(?:hf://)?(?P<repo>[^@#]+)(?:@(?P<revision>[^@#]+))?(?:#(?P<subfolder>[^@#]+))?")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII | re.IGNORECASE)
# Never fetched: they would let a caller send requests from the server to whatever it can reach.
_WEB = ("http", "https")
# Ways out of a folder, of a URL or of its scheme.
_FORBIDDEN = ("..", "\\", "%", "::", "~")
_LENGTH = 1024
_FORMS = "Give a folder, file:///FOLDER, hf://OWNER/NAME[@REVISION][#SUBFOLDER], or a URL such as s3://BUCKET/FOLDER."


@dataclass(frozen=True)
class SourcePolicy:
    """Decides which sources may be fetched.

    Attributes:
        allowed: globs such as ``hf://org/*``, ``s3://bucket/prefix/*``, ``file:///adapters/*``.
        tokens: tenant -> its token for the hub; that of ``""`` is for names without a tenant.
    """

    allowed: tuple[str, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for glob in self.allowed:
            if _scheme(glob) in ("", *_WEB):
                raise InvalidRequestError(
                    f"The sources {glob!r} cannot be allowed.", hint="Allow hf://ORG/*, s3://BUCKET/* or file:///DIR/*."
                )

    def source(self, registration: Registration) -> AdapterSource:
        """Return the source of a registration.

        Raises:
            InvalidRequestError: it is none. NotAllowedError: it may not be fetched.
        """
        source = self._read(registration)
        if registration.trusted or any(fnmatchcase(source.url, _without_links(glob)) for glob in self.allowed):
            return source
        raise NotAllowedError(
            f"The source {registration.source!r} is not allowed.",
            hint="The operator allows sources with --allow-source GLOB.",
            param="source",
        )

    def _read(self, registration: Registration) -> AdapterSource:
        text, trusted = registration.source, registration.trusted
        _check_text(text, "source", () if trusted else _FORBIDDEN)
        _check_text(registration.revision or "main", "revision", _FORBIDDEN)
        _check_text(registration.subfolder or "-", "subfolder", _FORBIDDEN)
        token = self.tokens.get(tenant_of(registration.name))
        if is_hub_page(text):
            repo, lookup = read_hub_page(text, LookupOptions(registration.revision), "source")
            return HubSource(repo, lookup.revision, registration.subfolder, token)
        scheme = _scheme(text)
        if scheme in _WEB:
            raise NotAllowedError(f"{text!r} is a web address, which is never fetched.", hint=_FORMS, param="source")
        if _is_folder(text, scheme, trusted=trusted):
            return _folder(registration)
        if scheme in ("", "hf"):
            return _hub(registration, token)
        if "@" in text or "?" in text or "#" in text:
            raise _invalid(text, "source")
        return RemoteSource("/".join(part.strip("/") for part in (text, registration.subfolder) if part))


def _scheme(text: str) -> str:
    match = _SCHEME.match(text)
    return match[1].lower() if match else ""


def _check_text(text: str, what: str, forbidden: tuple[str, ...]) -> None:
    if not text.strip() or len(text) > _LENGTH or not text.isprintable() or any(part in text for part in forbidden):
        raise _invalid(text, what)


def _invalid(text: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{text[:80]!r} is no valid {what}.", hint=_FORMS, param=what)


def _is_folder(text: str, scheme: str, *, trusted: bool) -> bool:
    """Tell whether a source is a folder here; a relative path is one only where the operator gave it."""
    if scheme == "file" or text.startswith("/"):
        return True
    return trusted and not scheme and (exists(Path(text).expanduser()) or not looks_like_hub_id(text))


def _folder(registration: Registration) -> FolderSource:
    text, inner = registration.source.removeprefix("file://"), registration.subfolder or ""
    if inner.startswith("/") or (not text.startswith("/") and not registration.trusted):
        raise _invalid(inner or text, "source")
    try:
        path = (Path(text).expanduser() / inner).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, the home of nobody
        raise _invalid(text, "source") from error
    return FolderSource(path, links=registration.trusted)


def _hub(registration: Registration, token: str | None) -> HubSource:
    match = _HUB.fullmatch(registration.source)
    if match is None or not looks_like_hub_id(match["repo"]):
        raise _invalid(registration.source, "source")
    revision, subfolder = registration.revision, registration.subfolder
    if (match["revision"] and revision) or (match["subfolder"] and subfolder):
        raise InvalidRequestError(
            f"The source {registration.source!r} and the request both give a revision or a subfolder.",
            hint="Give it once.",
            param="source",
        )
    may_be_folder = registration.trusted and not _scheme(registration.source)
    return HubSource(
        match["repo"], match["revision"] or revision, match["subfolder"] or subfolder, token, may_be_folder
    )


def _without_links(glob: str) -> str:
    """Return the glob of a source; one of folders with the links on the way to them followed."""
    if not glob.startswith("file://"):
        return glob
    fixed = re.split(r"[*?\[]", glob.removeprefix("file://"))[0].rpartition("/")[0]
    return f"file://{os.path.realpath(fixed or '/').rstrip('/')}{glob[len('file://') + len(fixed) :]}"
