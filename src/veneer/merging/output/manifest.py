"""Writes and reads ``merge_manifest.json``: a merge's inputs, options and outputs, and its rounding errors."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from veneer._version import __version__
from veneer.errors import CorruptFileError, IncompleteCheckpointError
from veneer.files.json_file import read_json
from veneer.files.paths import is_file
from veneer.files.source import Source
from veneer.merging.base.companion_files import MANIFEST
from veneer.merging.base.hashing import is_digest
from veneer.merging.work.merge_options import MergeOptions
from veneer.merging.work.prepare import PreparedMerge
from veneer.merging.work.rounding import STOCHASTIC, RoundingFigures

VERSION = 2
# Below this share of the change's energy the user is warned.
ENOUGH = 0.9


def manifest_of(
    prepared: PreparedMerge,
    inputs: Mapping[str, str],
    from_cache: Sequence[str],
    adapters: Sequence[Mapping[str, str]],
    outputs: Mapping[str, str],
    figures: Sequence[RoundingFigures],
) -> dict[str, Any]:
    """Return the manifest as plain JSON types.

    Args:
        prepared: the merge.
        inputs: file of the base -> digest.
        from_cache: files of the base whose digest is the name that the hub's cache gives them, and not computed.
        adapters: for each adapter, file -> digest.
        outputs: file of the output -> digest.
        figures: of each changed tensor.
    """
    return {
        "manifest_version": VERSION,
        "versions": {
            "veneer": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "base": {
            "origin": prepared.base.origin,
            "commit": prepared.base.commit,
            "digests": dict(inputs),
            "digests_from_cache": list(from_cache),
        },
        "adapters": [
            {
                "origin": source.origin,
                "commit": source.commit,
                "weight": adapter.weight,
                "peft_type": str(adapter.checkpoint.config.peft_type),
                "digests": dict(digests),
            }
            for adapter, source, digests in zip(prepared.adapters, prepared.sources, adapters, strict=True)
        ],
        "options": prepared.options.to_dict(),
        "untied": prepared.plan.untied,
        "outputs": {"digests": dict(outputs)},
        "summary": summary(figures),
        "tensors": [{**vars(tensor), "survives": tensor.share_kept} for tensor in figures],
    }


def summary(figures: Sequence[RoundingFigures]) -> dict[str, Any]:
    """Return the figures of all tensors together."""
    change = math.sqrt(sum(tensor.change**2 for tensor in figures))
    error = math.sqrt(sum(tensor.rounding_error**2 for tensor in figures))
    total = RoundingFigures("", "", change, error)
    return {
        "changed_tensors": sum(1 for tensor in figures if tensor.change),
        "change": change,
        "rounding_error": error,
        "survives": total.share_kept,
    }


def warnings_of(figures: Sequence[RoundingFigures], whole: bool, rounding: str) -> list[str]:
    """Return the warnings that the figures call for."""
    total = summary(figures)
    if not total["changed_tensors"]:
        return ["zero-effect adapter: every change is zero, so the output is the base."] if not whole else []
    if total["survives"] >= ENOUGH:
        return []
    worst = min(figures, key=lambda tensor: tensor.share_kept)
    lost = 100 * (1 - total["survives"])
    mends = ["--dtype float32 keeps all of it", "an unmerged adapter loses nothing"]
    if rounding != STOCHASTIC:
        mends.insert(1, "--rounding stochastic keeps it on average")
    return [
        f"Rounding to {worst.dtype} costs {lost:.0f} % of the change (most in {worst.name}, which keeps "
        f"{100 * worst.share_kept:.0f} %): {'; '.join(mends)}."
    ]


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the manifest into a folder."""
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a merged folder's manifest, and check the parts that are used.

    Raises:
        IncompleteCheckpointError: there is no manifest, or one of another version.
        CorruptFileError: no merge wrote this manifest, or it names a file outside of the folder.
    """
    path = folder / MANIFEST
    if not is_file(path):
        raise IncompleteCheckpointError(
            f"{folder} holds no {MANIFEST}: `veneer merge` has not written it, or that file was left behind.",
            hint="Give the folder of a merge, or merge again.",
        )
    values = _in_current_form(read_json(path))
    if values.get("manifest_version") != VERSION:
        raise IncompleteCheckpointError(
            f"{path} was written by another version of Veneer.", hint="Merge again with `veneer merge`."
        )
    wrong = next((part for part, is_right in _PARTS.items() if not is_right(values.get(part))), None)
    if wrong is not None:
        raise CorruptFileError(
            f"{path}: {wrong!r} is not what a merge writes there.", hint="Copy it again, or merge again."
        )
    here = Source(folder, str(path))
    for name in (*values["base"]["digests"], *values["outputs"]["digests"]):
        here.path(name)
    return values


def _in_current_form(values: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as it would be written today: version 1 has ``sha256`` for what is now ``digests``."""
    if values.get("manifest_version") != 1:
        return values
    for part in filter(None, map(values.get, ("base", "outputs"))):
        digests = part.get("sha256") if isinstance(part, dict) else None
        if isinstance(digests, dict):
            part["digests"] = {name: digest and f"sha256:{digest}" for name, digest in digests.items()}
    return {**values, "manifest_version": VERSION}


def _is_base(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("origin"), str) and _are_digests(value.get("digests"))


def _are_adapters(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(adapter, dict)
        and isinstance(adapter.get("origin"), str)
        and type(adapter.get("weight")) in (int, float)
        and math.isfinite(adapter["weight"])
        for adapter in value
    )


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_digest, value.values()))


def _are_options(value: Any) -> bool:
    """Tell whether a value has the names and types of a merge's options; what uses an option checks its value."""
    kinds = {"str": str, "int": int, "bool": bool, "None": type(None)}
    allowed = {f.name: [kinds[kind.strip()] for kind in str(f.type).split("|")] for f in fields(MergeOptions)}
    return isinstance(value, dict) and all(type(value[key]) in allowed.get(key, ()) for key in value)


_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "base": _is_base,
    "adapters": _are_adapters,
    "options": _are_options,
    "outputs": lambda value: isinstance(value, dict) and _are_digests(value.get("digests")),
}
