"""Tells an adapter of another tool from PEFT's and from a model; for those two no format is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.errors import NotACheckpointError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FOREIGN_FILES, LITGPT_WEIGHTS, MODEL_CONFIG
from veneer.files.source import Source

if TYPE_CHECKING:
    from veneer.formats.format import Format


def foreign(source: Source) -> Format | None:
    """Return the format of another tool's adapter; ``None`` for PEFT's, for a model, and where none is recognised."""
    if source.file is None and _is_plain(source):
        return None
    from veneer.formats.registry import recognise

    found = recognise(source)
    return None if found is None or found.name == "peft" else found


def check_is_adapter_file(source: Source) -> None:
    """Raise ``NotACheckpointError`` for a file of another tool's kind in which no format is recognised."""
    if source.file is not None and source.file.suffix in FOREIGN_FILES:
        raise NotACheckpointError(
            f"{source.origin} is no adapter in a format that is known.",
            hint="A model in GGUF is loaded as the base of an adapter: base=FOLDER, gguf_file=NAME.",
        )


def _is_plain(source: Source) -> bool:
    """Tell by two looks at a folder whether it holds PEFT's adapter, or a model and no adapter."""
    if source.has(ADAPTER_CONFIG):
        return source.has(ADAPTER_WEIGHTS)
    return source.has(MODEL_CONFIG) and not source.has(LITGPT_WEIGHTS)
