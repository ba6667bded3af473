"""Lets PEFT's config travel in the metadata of other formats, so that a way there and back restores it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from veneer.formats.table import OPTIONS

if TYPE_CHECKING:
    from veneer.formats.canonical import CanonicalAdapter

# The key in a format's metadata, of which other readers take no notice.
KEY = "veneer.original_config"


def metadata_of(adapter: CanonicalAdapter) -> dict[str, str]:
    """Return the metadata to write with an adapter's tensors: its config, where it has one."""
    config = of(adapter)
    if config is None:
        return {}
    # The order of a pattern's keys has meaning.
    return {KEY: json.dumps({"config": config, "modules": _digest(adapter.modules)})}


def of(adapter: CanonicalAdapter) -> Mapping[str, Any] | None:
    """Return an adapter's PEFT config: the one that travelled with exactly these modules, or its own.

    One that travelled says nothing that the file does not say: options that change what factors mean are the file's.
    """
    config, own = _travelled(adapter), adapter.config or {}
    says_more = config is not None and any(config.get(option) and not own.get(option) for option in OPTIONS)
    return adapter.config if config is None or says_more else config


def _travelled(adapter: CanonicalAdapter) -> dict[str, Any] | None:
    try:
        values = json.loads(adapter.metadata.get(KEY, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("modules") != _digest(adapter.modules):
        return None
    config = values.get("config")
    return config if isinstance(config, dict) else None


def _digest(modules: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(modules)).encode()).hexdigest()
