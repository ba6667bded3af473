"""Checks the values of configs: each is of the type that its field declares, and numbers are in range."""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from veneer.errors import ConfigError, ConfigTypeError
from veneer.keywords import Fields

# The largest number of the dtype that adapters compute in.
LARGEST = (2 - 2**-23) * 2.0**127

# Types as they are declared, in words.
_WORDS = {
    **{"str": "a string", "int": "an integer", "float": "a number", "bool": "True or False", "None": "None"},
    **{"list[str]": "a list of strings", "list[int]": "a list of integers"},
}

# Worked out from the annotations' text, which takes longer than everything else about a config.
_declared_types = lru_cache(maxsize=None)(get_type_hints)


class Checked(Fields):
    """Lets a dataclass refuse values that are not of the declared types."""

    def __post_init__(self) -> None:
        check_types(self, f"{type(self).__name__}: ")


def check_types(config: Any, where: str = "") -> None:
    """Raise ``ConfigTypeError`` when a field's value is not of the type that the field declares."""
    kind: Any = type(config)
    declared = _declared_types(kind)
    for field in fields(config):
        value = getattr(config, field.name)
        if not matches_type(value, declared[field.name]):
            raise ConfigTypeError(f"{where}{_mismatch(field, value)}", hint=_remedy(field, declared[field.name]))


def _mismatch(field: Field[Any], value: Any) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:59] + "…"
    if "Literal[" in str(field.type):
        return f"{field.name}={shown}: Unsupported `{field.name}` {shown}."
    wrong = "is no number that float32 holds" if _is_beyond(value) else f"is not of the type {field.type}"
    return f"{field.name}={shown} {wrong}."


def _remedy(field: Field[Any], declared: Any) -> str:
    """Return the hint for a field that was given another type: the choices, its default, or the types in words."""
    if get_origin(declared) is Literal:
        *others, last = map(repr, get_args(declared))
        return f"Supported values are {', '.join(others)}{',' * (len(others) > 1)} and {last}."
    if field.default not in (None, MISSING):
        return f"The default is {field.default!r}."
    words = [_WORDS.get(name.strip(), "") for name in str(field.type).split("|")]
    return f"`{field.name}` must be {' or '.join(words)}." if all(words) else "Compare it with a config that loads."


def matches_type(value: Any, declared: Any) -> bool:
    """Tell whether ``value`` is of a ``declared`` type, as ``typing.get_type_hints`` gives it.

    A bool is no number, numbers are those that float32 holds, a tuple or set may stand for a list, and ``None`` for a
    switch that is off.
    """
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(matches_type(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, set):
        return isinstance(value, (list, tuple, set, frozenset)) and all(matches_type(item, inner[0]) for item in value)
    if origin is dict:
        key, item = inner
        return isinstance(value, dict) and all(matches_type(k, key) and matches_type(v, item) for k, v in value.items())
    if declared is bool:
        return value is None or isinstance(value, bool)
    if declared in (int, float):
        return _is_number(value, declared)
    return isinstance(value, declared)


def _is_beyond(value: Any) -> bool:
    """Tell whether a value is, or holds, a number that float32 does not: infinite, too large, or none (NaN)."""
    if isinstance(value, dict):
        return any(map(_is_beyond, value.values()))
    return isinstance(value, (int, float)) and not abs(value) <= LARGEST


def _is_number(value: Any, declared: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float) if declared is float else int):
        return False
    return not _is_beyond(value)


def check_at_least_one(config: object, *names: str) -> None:
    """Raise ``ConfigError`` when a field, or a value of one that holds patterns, is less than 1."""
    check_at_least(config, 1, *names)


def check_not_negative(config: object, *names: str) -> None:
    """Raise ``ConfigError`` when a field, or a value of one that holds patterns, is less than 0."""
    check_at_least(config, 0, *names)


def check_at_least(config: object, least: int, *names: str) -> None:
    """Raise ``ConfigError`` when a field, or a value of one that holds patterns, is less than ``least``."""
    for name in names:
        value = getattr(config, name)
        numbers = [n for n in (value.values() if isinstance(value, dict) else [value]) if n is not None]
        if min(numbers, default=least) < least:
            kind = "positive integer" if least else "non-negative"
            raise ConfigError(
                f"{name}={value!r} is too small: `{name}` should be a {kind} value but the value passed is {value!r}.",
                hint=f"{name} must be a {kind}: it is at least {least}.",
            )


def check_choice(config: object, name: str, *choices: Any) -> None:
    """Raise ``ConfigError`` when a field is none of its choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown.", hint=f"Known: {', '.join(map(repr, choices))}.")


def check_share(config: object, *names: str) -> None:
    """Raise ``ConfigError`` when a field is no share from 0 up to 1."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is no share.", hint="It lies between 0 (off) and 1 (excluded)."
            )
