"""Finds several adapters in one folder: ``default`` at its root, any other in a subfolder of its name.

    folder/adapter_config.json, adapter_model.safetensors      the adapter "default"
    folder/french/adapter_config.json, ...                     the adapter "french"
    folder/adapter_set.json                                    their order, and which were active

The layout is PEFT's; ``adapter_set.json`` is ours, and stays only where it says something that the folders
do not: with more than one adapter, or one that is not ``default``. It also marks a set that is being saved.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from veneer.errors import CorruptFileError, IncompleteCheckpointError
from veneer.files.names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_STEM, ADAPTER_WEIGHTS
from veneer.files.paths import exists, is_file
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.tensor_keys import PREFIX
from veneer.files.weight_files import read_headers

SET_FILE = "adapter_set.json"
SAVING = "saving"  # in the set file: which adapters are being saved
DEFAULT = "default"
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Member:
    """One adapter of a set: its name and its folder."""

    name: str
    source: Source


def place(folder: Path, name: str) -> Path:
    """Return the folder in which the adapter ``name`` is saved under ``folder``."""
    return folder if name == DEFAULT else folder / name


def members(source: Source) -> list[Member]:
    """List the adapters of a set, in their order; empty when ``source`` is a single adapter or none.

    A folder with an adapter at its root and none below it is a single adapter. A trainer's ``checkpoint-500``
    below is an earlier state of the adapter, no member, unless the set file names it; nor is a folder with a dot in
    its name (``.hidden``, ``v1.5``), which cannot name an adapter. Those below an X-LoRA come with it.
    """
    if source.file is not None:
        return []
    listed = _read(source)[0]
    if not listed and source.has(ADAPTER_CONFIG) and source.json(ADAPTER_CONFIG).get("peft_type") == "XLORA":
        return []
    below = {
        child.name: Member(child.name, replace(source, root=child, origin=f"{source.origin}/{child.name}"))
        for child in sorted(source.root.iterdir())
        if "." not in child.name and is_file(child / ADAPTER_CONFIG)
        if child.name in listed or not TRAINER_CHECKPOINT.fullmatch(child.name)
    }
    if not below:
        return []
    if source.has(ADAPTER_CONFIG):
        below = {DEFAULT: Member(DEFAULT, source), **below}
    return [below[name] for name in dict.fromkeys([*(n for n in listed if n in below), *below])]


def free_name(origin: str, taken: Collection[str]) -> str:
    """Name an adapter as its folder, with a number where that name is taken: ``french``, ``french-2``."""
    name = re.sub(r"[./\\]", "_", PurePath(origin).name)
    name = name if name.strip("_") else DEFAULT
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def active(source: Source, members: Sequence[Member]) -> list[str]:
    """List the adapters of a set that were active when it was saved; the first where that is not recorded."""
    names = [member.name for member in members]
    recorded = [name for name in _read(source)[1] if name in names]
    return recorded or names[:1]


def _read(source: Source) -> tuple[list[str], list[str]]:
    if not source.has(SET_FILE):
        return [], []
    values = source.json(SET_FILE)
    if values.get(SAVING):
        raise IncompleteCheckpointError(
            f"{source.origin}: saving the adapters here was cut off, so that files of two states may lie side by side.",
            hint=f"Save them again. A whole adapter can be loaded by its own folder, or once {SET_FILE} is deleted.",
        )
    parts = values.get("adapters", []), values.get("active", [])
    if not all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in parts):
        raise CorruptFileError(
            f"{source.origin}/{SET_FILE}: 'adapters' and 'active' must be lists of names.",
            hint="Delete the file to load every adapter in the folder.",
        )
    return parts[0], parts[1]


def expert_source(name: str, index: int, path: str, beside: Source | None) -> Source:
    """Find an expert: beside the adapter, in a folder of its name or number; else where ``path`` says."""
    if beside is None or beside.file is not None:
        return resolve(path, what="adapter")
    for folder in (name, str(index)):
        expert = replace(beside, root=beside.root / folder, origin=f"{beside.origin}/{folder}")
        if expert.has(ADAPTER_CONFIG) and _is_whole(expert):
            return expert
    relative = beside.root / path
    return resolve(relative if exists(relative) else path, what="adapter")


def _is_whole(source: Source) -> bool:
    """Tell whether a LoRA beside an X-LoRA is whole: peft 0.21 writes a part of it there, and a part of the base."""
    if source.has(ADAPTER_PICKLE) and not source.has(ADAPTER_WEIGHTS):
        return True
    return all(key.startswith(PREFIX) for header in read_headers(source, ADAPTER_STEM) for key in header.tensors)
