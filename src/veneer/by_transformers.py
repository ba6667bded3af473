"""What transformers raises, told as an error of the input that it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from veneer.errors import VeneerError


@contextmanager
def by_transformers(kind: type[VeneerError], what: str, hint: str) -> Iterator[None]:
    """Turn whatever transformers raises inside the ``with`` block into one error.

    Args:
        kind: of the error.
        what: cannot be done; the first line of transformers' own text follows it.
        hint: how to mend it.

    Raises:
        kind: for any exception but Veneer's own and the lack of memory.
    """
    try:
        yield
    except (VeneerError, MemoryError):
        raise
    except Exception as error:  # whatever transformers makes of a config or of weights that it cannot use
        raise kind(f"{what}: {first_line(error)}", hint=hint) from error


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
