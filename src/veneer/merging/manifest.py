"""``merge_manifest.json``: what a merged folder was made from, how, and what rounding left of the change."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer._version import __version__
from veneer.errors import IncompleteCheckpointError
from veneer.merging.prepare import Prepared
from veneer.merging.rounding import STOCHASTIC, Figures
from veneer.source import read_json

MANIFEST = "merge_manifest.json"
VERSION = 1
# Below this share of the change's energy a user should think again.
ENOUGH = 0.9


def manifest_of(
    prepared: Prepared,
    inputs: Mapping[str, str],
    adapters: Sequence[Mapping[str, str]],
    outputs: Mapping[str, str],
    figures: Sequence[Figures],
) -> dict[str, Any]:
    """The manifest as plain JSON types.

    Args:
        prepared: the merge.
        inputs: file of the base -> SHA-256.
        adapters: for each adapter, file -> SHA-256.
        outputs: file of the output -> SHA-256.
        figures: of each changed tensor.
    """
    return {
        "manifest_version": VERSION,
        "versions": {
            "veneer": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "base": {"origin": prepared.base.origin, "commit": prepared.base.commit, "sha256": dict(inputs)},
        "adapters": [
            {
                "origin": source.origin,
                "commit": source.commit,
                "weight": adapter.weight,
                "peft_type": str(adapter.checkpoint.config.peft_type),
                "sha256": dict(digests),
            }
            for adapter, source, digests in zip(prepared.adapters, prepared.sources, adapters, strict=True)
        ],
        "options": prepared.options.to_dict(),
        "untied": prepared.plan.untied,
        "outputs": {"sha256": dict(outputs)},
        "summary": summary(figures),
        "tensors": [{**vars(one), "survives": one.survives} for one in figures],
    }


def summary(figures: Sequence[Figures]) -> dict[str, Any]:
    """All tensors together."""
    change = math.sqrt(sum(one.change**2 for one in figures))
    error = math.sqrt(sum(one.rounding_error**2 for one in figures))
    total = Figures("", "", change, error)
    return {
        "changed_tensors": sum(1 for one in figures if one.change),
        "change": change,
        "rounding_error": error,
        "survives": total.survives,
    }


def warnings_of(figures: Sequence[Figures], whole: bool, rounding: str) -> list[str]:
    """What the figures should make a user think of."""
    found = summary(figures)
    if not found["changed_tensors"]:
        return ["zero-effect adapter: every change is zero, so the output is the base."] if not whole else []
    if found["survives"] >= ENOUGH:
        return []
    worst = min(figures, key=lambda one: one.survives)
    lost = 100 * (1 - found["survives"])
    mends = ["--dtype float32 keeps all of it", "an unmerged adapter loses nothing"]
    if rounding != STOCHASTIC:
        mends.insert(1, "--rounding stochastic keeps it on average")
    return [
        f"Rounding to {worst.dtype} costs {lost:.0f} % of the change (most in {worst.name}, which keeps "
        f"{100 * worst.survives:.0f} %): {'; '.join(mends)}."
    ]


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the manifest into a folder."""
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A merged folder's manifest.

    Raises:
        IncompleteCheckpointError: there is none, or none of this version.
    """
    path = folder / MANIFEST
    values = read_json(path) if path.is_file() else {}
    if values.get("manifest_version") != VERSION:
        raise IncompleteCheckpointError(
            f"{folder}: there is no {MANIFEST} of this version, so nothing says how it was merged.",
            hint="Merge it again with `veneer merge`.",
        )
    return values
