"""Safetensors files with any header, valid or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def described(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def written(path: Path, header: Any, data: int = 16) -> Path:
    """A safetensors file with any header, valid or not: an object, or its raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    return path
