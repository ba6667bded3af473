"""Whether a value from a config file is of the type that its field declares."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from veneer.errors import ConfigError

# The largest number of the dtype that adapters compute in.
LARGEST = (2 - 2**-23) * 2.0**127


def matches_type(value: Any, declared: Any) -> bool:
    """Whether ``value`` is of a ``declared`` type, as ``typing.get_type_hints`` gives it.

    A bool is no number, a number is one that float32 holds, a tuple or set may stand for a list, and ``None`` for a
    switch that is off.
    """
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(matches_type(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, (list, tuple, set, frozenset)) and all(matches_type(item, inner[0]) for item in value)
    if origin is dict:
        key, item = inner
        return isinstance(value, dict) and all(matches_type(k, key) and matches_type(v, item) for k, v in value.items())
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


def check_at_least_one(config: object, *names: str) -> None:
    """Raise ``ConfigError`` when a field, or a value of one that holds patterns, is less than 1."""
    _check_least(config, 1, names)


def check_not_negative(config: object, *names: str) -> None:
    """Raise ``ConfigError`` when a field, or a value of one that holds patterns, is less than 0."""
    _check_least(config, 0, names)


def _check_least(config: object, least: int, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        given = [one for one in (value.values() if isinstance(value, dict) else [value]) if one is not None]
        if min(given, default=least) < least:
            raise ConfigError(f"{name}={value!r} is too small.", hint=f"It is at least {least}.")


def check_share(config: object, *names: str) -> None:
    """Raise ``ConfigError`` when a field is no share that can be dropped."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is no share.", hint="It lies between 0 (off) and 1 (excluded)."
            )
