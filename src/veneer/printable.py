"""Text from files and arguments, safe to print: a checkpoint's config must not steer the terminal."""

from __future__ import annotations

import unicodedata

# Beside what prints: a line's end, a tab, and the invisible characters that join or part letters and emoji.
_WRITING = frozenset("\n\t\u200c\u200d")


def printable(text: str) -> str:
    r"""``text`` with each control character and lone surrogate written as its escape, such as ``\x1b``."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def written(text: str) -> str:
    r"""A model's answer for a terminal: the same, but tabs, spaces of any width and joiners stay as they are."""
    return "".join(c if c in _WRITING or unicodedata.category(c) == "Zs" else printable(c) for c in text)


def one_line(text: str) -> str:
    """The same on a single line, its runs of white space as one space."""
    return printable(" ".join(text.split()))
