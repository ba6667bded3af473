"""Writes figures for people: three digits, and the unit that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# A narrow space between thousands, and one that does not break before a unit.
_THOUSANDS, _SPACE, _MINUS = "\u202f", "\u00a0", "\u2212"
_TIMES: Mapping[str, float] = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
_SIZES: Mapping[str, float] = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}

_COUNTS: Mapping[str, float] = {"B": 1e9, "M": 1e6}


def number(value: float, digits: int = 3) -> str:
    """Write significant digits without an exponent: ``1234``, ``41.2``, ``0.052``; ``∞``."""
    if not math.isfinite(value):
        return ("" if value > 0 else _MINUS) + "∞"
    if value == 0:
        return "0"
    value = float(f"{value:.{digits}g}") if abs(value) < 10**digits else value
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(places, 0), 6)}f}".replace(",", _THOUSANDS).replace("-", _MINUS)


def seconds(value: float) -> str:
    """Write a time such as ``1.23 s``, ``41.2 ms`` or ``8.13 µs``; minutes from two on."""
    if math.isfinite(value) and value >= 120:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}{_SPACE}min{_SPACE}{rest:02}{_SPACE}s"
    return _with_unit(value, _TIMES)


def nbytes(value: float) -> str:
    """Write a size such as ``271 MB``; units are decimal, as for files."""
    return _with_unit(value, _SIZES)


def percent(share: float) -> str:
    """Write a share such as ``4.2 %``."""
    return f"{number(100 * share, 2)}{_SPACE}%"


def count(value: float, word: str) -> str:
    """Write a count such as ``1 request`` or ``3 requests``."""
    shown = (
        f"{value:,.0f}".replace(",", _THOUSANDS) if math.isfinite(value) and value == round(value) else number(value)
    )
    return f"{shown}{_SPACE}{word}" + ("" if value == 1 else "s")


def short_count(value: float) -> str:
    """Write a large number such as ``135M`` or ``1.10B``."""
    unit, size = next(((unit, size) for unit, size in _COUNTS.items() if value >= 0.9995 * size), ("", 1.0))
    return f"{number(value / size)}{unit}"


def plain(text: str) -> str:
    """Replace narrow and unbreakable spaces by common ones."""
    return text.replace(_THOUSANDS, " ").replace(_SPACE, " ")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Write a list such as ``a, b and c``; of more than ``most`` names the first, and the number of the others."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _with_unit(value: float, units: Mapping[str, float]) -> str:
    """Write a value in the largest unit of which it is at least one, rounded to three digits."""
    smallest = list(units)[-1]
    unit = next((unit for unit, size in units.items() if abs(value) >= 0.9995 * size), smallest)
    return f"{number(value / units[unit])}{_SPACE}{unit}"
