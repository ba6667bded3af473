"""Warnings that point at the line of the program that led to them, and not into this package."""

from __future__ import annotations

import sys
import warnings

from veneer.printable import printable


def tell(message: str) -> None:
    """Warn at the nearest line outside of this package; what a checkpoint says in it steers no terminal."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "veneer":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(printable(message), stacklevel=depth)
