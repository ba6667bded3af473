"""Reads the names of dtypes that users write; imports no torch."""

from __future__ import annotations

import re

from veneer.errors import UsageError

_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_FLOATING = re.compile(r"b?float\d+(_\w+)?|half|float|double")


def torch_name(dtype: str) -> str:
    """Return torch's name of a floating dtype: that of ``"bf16"`` is ``"bfloat16"``; ``"auto"`` stays."""
    name = _SHORT.get(dtype, dtype)
    if name != "auto" and not _FLOATING.fullmatch(name):
        raise unknown_dtype(dtype)
    return name


def unknown_dtype(dtype: str) -> UsageError:
    """Make the error for a name that is no floating dtype's."""
    return UsageError(
        f"Unknown dtype {dtype!r}.", hint="Known: auto, float32 (or fp32), bfloat16 (bf16), float16 (fp16)."
    )
