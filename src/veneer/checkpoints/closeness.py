"""How well the names of an adapter fit a model, before it is bound."""

from __future__ import annotations

from enum import IntEnum


class Closeness(IntEnum):
    """Whether the modules that an adapter names are a model's: not all, under today's names, or as they are."""

    NONE = 0
    RENAMED = 1
    EXACT = 2
