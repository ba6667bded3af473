"""Finds and opens adapters, each once, and refuses full models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.base import PeftConfig
from veneer.configs.names import PeftType
from veneer.errors import NotACheckpointError
from veneer.files import adapter_folders
from veneer.files.adapter_folders import Member
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.formats.foreign import foreign
from veneer.formats.format import Base
from veneer.keywords import SOURCE, subset


def find_adapter(path: str | Path, options: Mapping[str, Any]) -> Source:
    """Find an adapter's files; of the keywords of a public call, those are heeded that say how."""
    return resolve(path, LookupOptions(**subset(options, SOURCE)), what="adapter")


def open_adapter(
    source: Source,
    strict: bool = True,
    config: PeftConfig | None = None,
    base: Callable[[], Base | None] = lambda: None,
) -> Checkpoint:
    """Open an adapter.

    Args:
        source: its folder.
        strict: raise on a key of its config that is unknown and may change the maths; else warn.
        config: used in place of its own.
        base: gives the facts of its base, which some formats of other tools need.

    Raises:
        NotACheckpointError: it is a full model, or a set of adapters without one at its root.
        SourceError, ConfigError: it cannot be read.
    """
    _check_single(source)
    return open_checkpoint(source, strict=strict, config=config, base=base)


def _check_single(source: Source) -> None:
    if source.has(ADAPTER_CONFIG) or foreign(source) is not None:
        return
    if source.has(MODEL_CONFIG):
        raise NotACheckpointError(
            f"{source.origin} is a full model, not an adapter.",
            hint=f"Load it with veneer.load({source.origin!r}).",
        )
    members = [member.source.origin for member in adapter_folders.members(source)]
    if members:
        raise NotACheckpointError(
            f"{source.origin} is a set of adapters, with none at its root.",
            hint=f"Load one of them ({', '.join(members)}), or all with veneer.load({source.origin!r}, base=model).",
        )


@dataclass(frozen=True)
class OpenedAdapters:
    """Holds the opened adapters of one path.

    Attributes:
        by_name: name on the model -> checkpoint, in the set's order; empty for a full model.
        active: those of a set that become active; ``None`` for a single adapter.
    """

    by_name: Mapping[str, Checkpoint] = field(default_factory=dict)
    active: Sequence[str] | None = None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, in the set's order."""
        return list(self.by_name.values())


def open_adapters(
    source: Source,
    members: Sequence[Member],
    name: str,
    strict: bool,
    config: PeftConfig | None = None,
    base: Callable[[], Base | None] = lambda: None,
) -> OpenedAdapters:
    """Open the members of a set; or the single adapter at ``source``, to be called ``name``, where there are none."""
    if not members:
        return OpenedAdapters({name: open_adapter(source, strict, config, base)})
    opened = {member.name: open_adapter(member.source, strict) for member in members}
    return OpenedAdapters(opened, adapter_folders.active(source, members))


def mixes_others(source: Source) -> bool:
    """Tell whether an adapter mixes others, by its config's file."""
    values = source.json(ADAPTER_CONFIG)
    return bool(values.get("arrow_config")) or values.get("peft_type") == PeftType.XLORA
