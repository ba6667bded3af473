"""Grades how well the module names of an adapter fit a model, before it is bound."""

from __future__ import annotations

from enum import IntEnum


class Closeness(IntEnum):
    """Grades an adapter's module names: not all are a model's, all are by today's names, or all are as they stand."""

    NONE = 0
    RENAMED = 1
    EXACT = 2
