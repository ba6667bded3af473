"""Checks a base and a source before an adapter is put on the one from the other."""

from __future__ import annotations

from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.base import PeftConfig
from veneer.configs.names import PeftType
from veneer.errors import NotACheckpointError
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from veneer.files.source import Source


def _check_is_adapter(source: Source) -> None:
    if source.has(MODEL_CONFIG) and not source.has(ADAPTER_CONFIG):
        raise NotACheckpointError(
            f"{source.origin} is a full model, not an adapter.",
            hint=f"Load it with veneer.load({source.origin!r}).",
        )


def _config_of(source: Source) -> PeftConfig:
    _check_is_adapter(source)
    return open_checkpoint(source).config


def _mixes(source: Source) -> bool:
    """Whether an adapter mixes others, by its config's file."""
    values = source.json(ADAPTER_CONFIG)
    return bool(values.get("arrow_config")) or values.get("peft_type") == PeftType.XLORA
