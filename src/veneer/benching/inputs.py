"""Finds the adapters to measure, and their base, from the paths given; nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import BaseModelError, UsageError
from veneer.files import adapter_folders
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_STEM, MODEL_CONFIG
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.weight_files import weight_files


@dataclass(frozen=True)
class AdapterInput:
    """An adapter to be measured.

    Attributes:
        name: unique among those measured.
        origin: the path or hub id.
        root: its folder on this machine.
        nbytes: of its weights on disk.
    """

    name: str
    origin: str
    root: Path
    nbytes: int


@dataclass(frozen=True)
class Inventory:
    """The base and the adapters to measure.

    Attributes:
        entry: the path for :func:`veneer.load`, with ``base``.
        base: the base; ``None`` for the one that the adapters name.
        adapters: at least one.
    """

    entry: str
    base: str | None
    adapters: tuple[AdapterInput, ...]


def find_inputs(
    path: str | Path, base: str | Path | None, adapters: Sequence[str | Path], local_files_only: bool = False
) -> Inventory:
    """Find the adapters, and their base.

    Args:
        path: an adapter, a set of adapters, or a base model.
        base: the base of an adapter or a set.
        adapters: further adapters' paths; for a set also names of its members, which then are all that is taken of it.
        local_files_only: use no network.

    Raises:
        SourceError: there is nothing at one of the paths. UsageError: there is no adapter among them.
    """
    lookup = LookupOptions(local_files_only=local_files_only)
    source = resolve(path, lookup)
    members = {m.name: m.source for m in adapter_folders.members(source)}
    chosen = [str(name) for name in adapters if str(name) in members]
    more = [resolve(p, lookup, what="adapter") for p in adapters if str(p) not in chosen]
    sources = {name: members[name] for name in chosen or members}
    entry = str(path)
    if not members and source.has(MODEL_CONFIG) and not source.has(ADAPTER_CONFIG):
        if base is not None:
            raise BaseModelError(f"{path} is a full model; it takes no base.", hint="Leave --base out.")
        if not more:
            raise UsageError(
                f"{path} is a full model without adapters: there is nothing to merge.",
                hint="Give an adapter's path, or name some with --adapters.",
            )
        base, entry = path, str(more[0].root)
    elif not members:
        sources = {adapter_folders.free_name(source.origin, ()): source}
    for adapter in more:
        sources[adapter_folders.free_name(adapter.origin, sources)] = adapter
    inputs = [_adapter_input(name, adapter) for name, adapter in sources.items()]
    return Inventory(entry, None if base is None else str(base), tuple(inputs))


def _adapter_input(name: str, source: Source) -> AdapterInput:
    # Loading reports the faults of a damaged adapter.
    files = weight_files(source, ADAPTER_STEM) if source.has(ADAPTER_CONFIG) else []
    return AdapterInput(name, source.origin, source.root, sum(file.stat().st_size for file in files))
