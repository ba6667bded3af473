"""Veneer: the runtime for parameter-efficient fine-tuned models.

``veneer.load(path)`` takes an adapter, a full model or a merged one and returns one model object with every
feature. Importing this module imports no torch; each name is fetched when it is first used, from where the stub
``__init__.pyi`` beside this file says that it lives.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from veneer._version import __version__ as __version__


def _homes() -> dict[str, str]:
    """Return public name -> the module that defines it."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names if alias.name != "__version__"}


_HOMES = _homes()

__all__ = sorted(["__version__", *_HOMES])


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
