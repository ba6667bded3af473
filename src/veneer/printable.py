"""Text from files and arguments, safe to print: a checkpoint's config must not steer the terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""``text`` with each control character and lone surrogate written as its escape, such as ``\x1b``."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """The same on a single line, its runs of white space as one space."""
    return printable(" ".join(text.split()))
