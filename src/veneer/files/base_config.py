"""Reads parts of a base model's ``config.json``, each of which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import CorruptFileError
from veneer.files.names import MODEL_CONFIG


def part_of(config: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    """Return the object that a config has under ``key``; an empty one where it has none.

    Raises:
        CorruptFileError: the value is no object.
    """
    value = config.get(key)
    if not isinstance(value, Mapping | None):
        raise CorruptFileError(
            f"{origin}/{MODEL_CONFIG}: {key!r} is a {type(value).__name__}, not a JSON object.",
            hint="Copy or download it again.",
        )
    return value or {}
