"""Opens the adapters that are to be put on a base, each once, after a look at what they are."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.base import PeftConfig
from veneer.configs.names import PeftType
from veneer.errors import NotACheckpointError
from veneer.files.adapter_folders import Member
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from veneer.files.source import Source


def open_adapter(source: Source, strict: bool = True, config: PeftConfig | None = None) -> Checkpoint:
    """Open an adapter.

    Args:
        source: its folder.
        strict: raise on a key of its config that is unknown and may change the maths; else warn.
        config: used in place of its own.

    Raises:
        NotACheckpointError: it is a full model. SourceError, ConfigError: it cannot be read.
    """
    if source.has(MODEL_CONFIG) and not source.has(ADAPTER_CONFIG):
        raise NotACheckpointError(
            f"{source.origin} is a full model, not an adapter.",
            hint=f"Load it with veneer.load({source.origin!r}).",
        )
    return open_checkpoint(source, strict=strict, config=config)


def open_members(members: Sequence[Member], strict: bool) -> list[Checkpoint]:
    """Open the adapters of a set, in its order."""
    return [open_adapter(member.source, strict) for member in members]


def mixes_others(source: Source) -> bool:
    """Whether an adapter mixes others, by its config's file."""
    values = source.json(ADAPTER_CONFIG)
    return bool(values.get("arrow_config")) or values.get("peft_type") == PeftType.XLORA
