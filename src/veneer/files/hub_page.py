"""Reads the addresses of models' pages on the hub as ids and revisions."""

from __future__ import annotations

import re
from dataclasses import replace
from urllib.parse import unquote

from veneer.errors import PathNotFoundError, UsageError
from veneer.files.lookup_options import LookupOptions

_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)"
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:/tree/(?P<revision>[^/?#]+))?/?(?:[?#].*)?",
    re.ASCII,
)


def is_url(text: str) -> bool:
    """Tell whether a text is a URL of any kind, and no path."""
    return re.match(r"[A-Za-z][\w+.-]*://", text) is not None


def is_hub_page(text: str) -> bool:
    """Tell whether a text is the address of a model's page on the hub."""
    return _PAGE.fullmatch(text) is not None


def read_hub_page(url: str, lookup: LookupOptions, what: str) -> tuple[str, LookupOptions]:
    """Return the hub id that an address names, and the lookup at its revision.

    Raises:
        PathNotFoundError: it is no model's page. UsageError: another revision is asked for.
    """
    page = _PAGE.fullmatch(url)
    if page is None:
        raise PathNotFoundError(
            f"The {what} {url!r} is a URL, and only a model's page, https://huggingface.co/OWNER/NAME or "
            "https://huggingface.co/OWNER/NAME/tree/REVISION, is understood.",
            hint="Give that page or the hub id, or download the files and give their folder.",
        )
    if page["revision"] is None:
        return page["repo"], lookup
    revision = unquote(page["revision"])
    # What an adapter records of its own base's revision says nothing of a base that is given by its page.
    asked = lookup.base_revision if what == "base" else lookup.revision
    if asked not in (None, revision):
        raise UsageError(
            f"The {what} {url} is at revision {revision!r}, and {asked!r} is asked for.", hint="Leave out one of them."
        )
    return page["repo"], replace(lookup, revision=revision)
