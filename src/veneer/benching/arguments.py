"""Parses the options of ``veneer bench``: ``1,8``, ``a=80,b=20``, ``16GB``. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from veneer.errors import UsageError, did_you_mean
from veneer.printing import parse_bytes


def counts(text: str, option: str) -> tuple[int, ...]:
    """Parse whole numbers from 1 on, such as ``1,8``; return each once, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text!r} is no list of whole numbers from 1 on.", hint=f"Such as {option} 1,8.")
    return tuple(sorted({int(part) for part in parts}))


def size(text: str, option: str) -> int:
    """Parse a size such as ``16GB``, ``512 MiB`` or ``1000000`` into bytes."""
    value = parse_bytes(text)
    if value is None:
        raise UsageError(f"{option} {text!r} is no amount of memory.", hint=f"Such as {option} 16GB.")
    return value


def shares(text: str, option: str) -> dict[str, float]:
    """Parse each adapter's part of the traffic, such as ``a=80,b=15,c=5``, in any unit."""
    parts: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            parts[name.strip()] = float(value)
        except ValueError:
            parts = {}
            break
    if not parts or "" in parts or len(parts) != text.count("=") or text.count(",") + 1 != len(parts):
        raise UsageError(
            f"{option} {text!r} does not say how requests spread over the adapters.",
            hint=f'Such as {option} "french=80,german=20".',
        )
    return parts


def spread_over(traffic: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """Return each adapter's share of the requests, the hottest first; equal shares without ``traffic``.

    Raises:
        UsageError: a name is unknown or missing, or a share is no number from 0 on.
    """
    if traffic is None:
        return dict.fromkeys(names, 1 / len(names))
    for name in traffic:
        if name not in names:
            raise UsageError(
                f"The traffic names {name!r}, which is none of the adapters.",
                hint=did_you_mean(name, names) + f"They are: {', '.join(names)}.",
            )
    missing = [name for name in names if name not in traffic]
    if missing:
        raise UsageError(
            f"The traffic says nothing of {', '.join(missing)}.", hint="Give each adapter its part; 0 is one."
        )
    total = sum(traffic.values())
    if not all(math.isfinite(part) and part >= 0 for part in traffic.values()) or not 0 < total < math.inf:
        raise UsageError(
            f"The traffic's parts must be numbers from 0 on, and not all 0: {dict(traffic)}.",
            hint="Such as a=80, b=20.",
        )
    hottest = sorted(names, key=lambda name: -traffic[name])
    return {name: traffic[name] / total for name in hottest}
