"""GPT-2's ``Conv1D``, told without importing transformers: nothing is one before its module is imported."""

from __future__ import annotations

import sys
from typing import Any


class _Conv1DType(type):
    def __instancecheck__(cls, module: Any) -> bool:
        found = sys.modules.get("transformers.pytorch_utils")
        return found is not None and isinstance(module, found.Conv1D)


class Conv1D(metaclass=_Conv1DType):
    """Stands for the class in ``isinstance``."""


def is_plain_conv1d(module: Any) -> bool:
    """Whether a module is a ``Conv1D`` itself and no subclass of it, which may do more than multiply."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and type(module) is found.Conv1D
