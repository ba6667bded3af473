"""Turns the exceptions of transformers into errors about its input, and answers its questions with no."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer.base_model.transformers_internals import replace_remote_code_timeout
from veneer.errors import VeneerError
from veneer.printing import first_line

# The number of blocks under way in which transformers must not ask, and its patience for an answer elsewhere.
_lock = threading.Lock()
_unasked = 0
_patience: Any = None


@contextmanager
def transformers_errors_as(kind: type[VeneerError], what: str, hint: str) -> Iterator[None]:
    """Turn whatever transformers raises inside the ``with`` block into one error, and let it ask nothing there.

    Args:
        kind: the error's class.
        what: the beginning of its message, which the first line of transformers' own text ends.
        hint: how to mend it.

    Raises:
        kind: for any exception but Veneer's own and the lack of memory.
    """
    try:
        with _without_questions():
            yield
    except (VeneerError, MemoryError):
        raise
    except BaseException as error:  # whatever transformers makes of a config or of weights that it cannot use
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise kind(f"{what}: {first_line(error).rstrip('.')}.", hint=hint) from error


def _is_panic(error: BaseException) -> bool:
    """Tell whether an error is the failure of a library in Rust, such as tokenizers: no ``Exception`` to Python."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _without_questions() -> Iterator[None]:
    """Have transformers refuse code that comes with a checkpoint where it would ask on the terminal whether to run it.

    ``trust_remote_code=False`` does not reach the configs inside of a config, about which it asks all the same. With
    no time for an answer it refuses at once.
    """
    global _unasked, _patience
    with _lock:
        if not _unasked:
            _patience = replace_remote_code_timeout(0)
        _unasked += 1
    try:
        yield
    finally:
        with _lock:
            _unasked -= 1
            if not _unasked:
                replace_remote_code_timeout(_patience)


# What to do where transformers cannot make a model.
ANOTHER_CLASS = "`veneer inspect` tells what is there; task= chooses another class."
