"""Lets PEFT's config travel in the metadata of other formats, so that a way there and back restores it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

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
    """Return an adapter's PEFT config: the one that travelled with exactly these modules, or its own."""
    try:
        values = json.loads(adapter.metadata.get(KEY, "null"))
    except (ValueError, RecursionError):
        return adapter.config
    if not isinstance(values, dict) or values.get("modules") != _digest(adapter.modules):
        return adapter.config
    config = values.get("config")
    return config if isinstance(config, dict) else adapter.config


def _digest(modules: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(modules)).encode()).hexdigest()
