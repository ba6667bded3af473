"""Reads parts of a base model's ``config.json``, each of which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import CorruptFileError
from veneer.files.names import DIFFUSERS_STEM, MODEL_CONFIG, MODEL_STEM


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


def is_of_diffusers(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is of a model of diffusers: a UNet, a transformer ..."""
    return "_class_name" in config


def stem_of(config: Mapping[str, Any]) -> str:
    """Return how the names of the weight files beside a config begin."""
    return DIFFUSERS_STEM if is_of_diffusers(config) else MODEL_STEM
