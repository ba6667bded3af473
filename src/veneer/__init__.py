"""Veneer: the runtime for parameter-efficient fine-tuned models.

``veneer.load(path)`` takes an adapter, a full model or a merged one and returns one model object with every
feature. Importing this module imports no torch; each name is fetched when it is first used, from where the stub
``__init__.pyi`` beside this file says that it lives.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from veneer._version import __version__ as __version__


def _homes() -> dict[str, str]:
    """Return each public name with the module that it lives in."""
    # Not ast, pathlib: with them `import veneer` takes 12 ms instead of 9.
    with open(f"{__file__}i", encoding="utf-8") as stub:  # noqa: PTH123
        imports = re.findall(r"^from (\S+) import \(?\s*(\w+) as ", stub.read(), re.MULTILINE)
    return {name: home for home, name in imports if name != "__version__"}


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
