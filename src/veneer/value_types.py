"""Whether a value from a config file is of the type that its field declares."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

# The largest number of the dtype that adapters compute in.
LARGEST = (2 - 2**-23) * 2.0**127


def fits(value: Any, declared: Any) -> bool:
    """Whether ``value`` is of a ``declared`` type, as ``typing.get_type_hints`` gives it.

    A bool is no number, a number is one that float32 holds, a tuple or set may stand for a list, and ``None`` for a
    switch that is off.
    """
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, (list, tuple, set, frozenset)) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        key, item = inner
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if declared is bool:
        return value is None or isinstance(value, bool)
    if declared in (int, float):
        return _is_number(value, declared)
    return isinstance(value, declared)


def is_beyond(value: Any) -> bool:
    """Whether it is, or holds, a number that float32 does not: infinite, too large, or none (NaN)."""
    if isinstance(value, dict):
        return any(map(is_beyond, value.values()))
    return isinstance(value, (int, float)) and not abs(value) <= LARGEST


def _is_number(value: Any, declared: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float) if declared is float else int):
        return False
    return not is_beyond(value)
