"""Saves a set of adapters together, and records which of them are active."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.checkpoints.checkpoint import Draft, replacing
from veneer.files.adapter_folders import DEFAULT, SAVING, SET_FILE
from veneer.files.atomic_write import atomic_write, writing


def save(folder: Path, drafts: Mapping[str, Draft], active: Sequence[str]) -> None:
    """Save adapters (name -> what to write) together, in this order, and record which are active.

    The set file says so while it is at work. If it is cut off, the folder is as before or refuses to load.
    """
    with replacing(list(drafts.values())):
        _write(folder, {SAVING: list(drafts)})
    write(folder, list(drafts), active)


def write(folder: Path, names: Sequence[str], active: Sequence[str]) -> None:
    """Record the order of a set, and its active adapters."""
    if list(names) == [DEFAULT]:
        with writing(folder / SET_FILE):
            (folder / SET_FILE).unlink(missing_ok=True)
    else:
        _write(folder, {"adapters": list(names), "active": [name for name in active if name in names]})


def _write(folder: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(folder / SET_FILE) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
