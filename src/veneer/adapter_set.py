"""Several adapters in one folder: ``default`` at its root, any other in a subfolder of its name.

    folder/adapter_config.json, adapter_model.safetensors      the adapter "default"
    folder/french/adapter_config.json, ...                     the adapter "french"
    folder/adapter_set.json                                    their order, and which were active

The layout is PEFT's; ``adapter_set.json`` is ours, and is written only where it says something that the folders
do not: with more than one adapter, or one that is not ``default``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from veneer.errors import CorruptFileError
from veneer.files import writing, written_whole
from veneer.source import ADAPTER_CONFIG, Source, is_file

SET_FILE = "adapter_set.json"
DEFAULT = "default"
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Member:
    """One adapter of a set: its name and its folder."""

    name: str
    source: Source


def place(folder: Path, name: str) -> Path:
    """Where the adapter ``name`` is saved under ``folder``."""
    return folder if name == DEFAULT else folder / name


def members(source: Source) -> list[Member]:
    """The adapters of a set, in their order; empty when ``source`` is a single adapter or none.

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


def active(source: Source, found: Sequence[Member]) -> list[str]:
    """Which adapters of the set were active when it was saved; the first when nothing says."""
    names = [member.name for member in found]
    recorded = [name for name in _read(source)[1] if name in names]
    return recorded or names[:1]


def write(folder: Path, names: Sequence[str], chosen: Sequence[str]) -> None:
    """Record the order of a set and which of it is active."""
    target = folder / SET_FILE
    if list(names) == [DEFAULT]:
        with writing(target):
            target.unlink(missing_ok=True)
        return
    text = json.dumps({"adapters": list(names), "active": [name for name in chosen if name in names]}, indent=2)
    with written_whole(target) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _read(source: Source) -> tuple[list[str], list[str]]:
    if not source.has(SET_FILE):
        return [], []
    values = source.json(SET_FILE)
    parts = values.get("adapters", []), values.get("active", [])
    if not all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in parts):
        raise CorruptFileError(
            f"{source.origin}/{SET_FILE}: 'adapters' and 'active' must be lists of names.",
            hint="Delete the file to load every adapter in the folder.",
        )
    return parts[0], parts[1]
