"""Reads a checkpoint under other keys than those that its files have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from veneer.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RenamedCheckpoint(Checkpoint):
    """Holds a checkpoint under other keys.

    Attributes:
        old: the checkpoint as it lies on disk.
        renamed: key here -> key there.
    """

    old: Checkpoint | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, old: Checkpoint, keys: Mapping[str, str], notes: Iterable[str] = ()) -> Self:
        """Put a checkpoint under other keys (key here -> key there), with more notes."""
        tensors = {key: old.tensors[there] for key, there in keys.items()}
        renamed = {key: there for key, there in keys.items() if key != there}
        notes = (*old.notes, *notes)
        return cls(old.origin, old.config, tensors, old.metadata, (), old, renamed, notes=notes, source=old.source)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by their keys here."""
        assert self.old is not None
        keys_there = {key: self.renamed.get(key, key) for key in keys}
        tensors = self.old.read(keys_there.values())
        return {key: tensors[there] for key, there in keys_there.items()}
