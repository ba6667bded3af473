"""Gives transformers the folder of a base without adapter files, and names the base's origin."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veneer.files.names import ADAPTER_CONFIG
from veneer.files.paths import exists
from veneer.files.source import Source


@contextlib.contextmanager
def without_adapter(source: Source) -> Iterator[Path]:
    """Give transformers a folder to load, without adapter files, which it would attach by itself."""
    if not source.has(ADAPTER_CONFIG):
        yield source.root
        return
    with tempfile.TemporaryDirectory(prefix="veneer-base-") as temporary:
        for path in source.root.iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)


def origin_of(source: Source) -> str:
    """Return the origin that a model keeps as its name: an absolute path, or the hub id."""
    return str(source.root.resolve()) if exists(Path(source.origin)) else source.origin
