"""Reads a JSON file of a checkpoint, and names the fault of a damaged one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from veneer.errors import CorruptFileError, PathNotFoundError, SourceError
from veneer.files.names import MAX_HEADER

COPY_AGAIN = "Copy or download it again."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, or raise ``CorruptFileError``, which tells where it breaks."""
    try:
        size = path.stat().st_size
        if size > MAX_HEADER:
            raise CorruptFileError(f"{path}: {size:,} bytes are too many for a file of JSON.", hint="Check the file.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CorruptFileError(
            f"{path}: no valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.",
            hint=COPY_AGAIN if error.doc else "The file is empty; copy or download it again.",
        ) from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: not UTF-8 text.", hint=COPY_AGAIN) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise CorruptFileError(f"{path}: its JSON cannot be read: {error}.", hint=COPY_AGAIN) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{path}: holds a {type(values).__name__}, not a JSON object.", hint="Check the file.")
    return values


def unreadable(path: Path, error: OSError) -> SourceError:
    """Make the error for a file that the system does not let be read."""
    kind = PathNotFoundError if isinstance(error, FileNotFoundError) else SourceError
    return kind(f"{path} cannot be read: {error.strerror or error}.", hint="Check the path and its permissions.")


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value from a file of settings is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
