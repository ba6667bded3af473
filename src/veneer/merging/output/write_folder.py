"""Writes a merge's output: the weights, the companion files, and the manifest."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.errors import OutputError
from veneer.files.atomic_write import writing
from veneer.files.names import INDEX, MODEL_CONFIG, MODEL_STEM
from veneer.files.source import Source
from veneer.files.torch_dtypes import DTYPES
from veneer.merging.base.companion_files import copy_companions, files_of_adapter, folders_of
from veneer.merging.base.hashing import Hashing, digest_in_cache, digest_of, stamp_of
from veneer.merging.output.file_writer import FileSink, write_files
from veneer.merging.output.manifest import manifest_of, warnings_of, write_manifest
from veneer.merging.output.merge_report import MergeReport
from veneer.merging.output.staging import StagingFolder, staging_folder
from veneer.merging.output.target import check_apart, check_space
from veneer.merging.output.unmerge import write_delta
from veneer.merging.work.file_layout import index_of
from veneer.merging.work.prepare import PreparedMerge


def write_folder(
    prepared: PreparedMerge,
    target: Path,
    hashing: Hashing,
    reversible: bool,
    resume: bool,
    overwrite: bool,
    on_step: Callable[[str], None],
    started: float,
) -> MergeReport:
    """Write the merged model; it appears at ``target`` when it is complete.

    Args:
        prepared: the merge.
        target: the folder to write.
        hashing: hashes the base's files, and has begun with those that it guessed.
        reversible: keep the delta that restores the base.
        resume: go on where the same merge was killed.
        overwrite: replace a model that is at ``target``.
        on_step: called with the name of each step as it begins.
        started: when the merge began, by ``time.perf_counter``.

    Raises:
        OutputError, MergeError: as :func:`veneer.merge` raises it.
    """
    check_apart(
        target,
        [("base", prepared.base.root), *(("adapter", source.file or source.root) for source in prepared.sources)],
    )
    with (
        writing(target, missing=OutputError),
        staging_folder(target, _made_from(prepared), resume, overwrite) as staging,
    ):
        manifest = _write(prepared, staging, hashing, reversible, on_step)
        prepared.check_unchanged()
        staging.commit()
    return _report(prepared, target, manifest, time.perf_counter() - started)


def _made_from(prepared: PreparedMerge) -> dict[str, Any]:
    """Return the facts that identify an output: inputs by size and time of change, options, layout."""
    adapters = [
        {name: list(stamp_of(path)[:2]) for name, path in files_of_adapter(source).items()}
        for source in prepared.sources
    ]
    return {
        "base": {name: list(stamp) for name, stamp in prepared.files.stamps().items()},
        "adapters": adapters,
        "weights": [adapter.weight for adapter in prepared.adapters],
        "options": prepared.options.to_dict(),
        "files": {file.name: file.nbytes for file in prepared.plan.files},
    }


def _write(
    prepared: PreparedMerge, staging: StagingFolder, hashing: Hashing, reversible: bool, on_step: Callable[[str], None]
) -> dict[str, Any]:
    """Write everything into the staging folder, the weights first and the config last; return the manifest."""
    plan, files = prepared.plan, prepared.files
    todo = [file for file in plan.files if file.name not in staging.finished]
    check_space(staging.target, sum(file.nbytes for file in todo))
    on_step("merging")
    sink = FileSink(staging.model, plan.files)
    hashing.expect(files.paths, files.at_opening)
    try:
        write_files(todo, plan.pieces, sink, lambda file, digest, figures: staging.record(file.name, digest, figures))
        on_step("writing")
        inputs = hashing.result()
    finally:
        sink.close()
    figures = [tensor for file in plan.files for tensor in staging.finished[file.name][1]]
    prepared.check_unchanged()
    _write_companions(prepared, staging.model)
    inputs |= {name: digest_of(path) for name, path in prepared.companions.items()}
    if reversible:
        on_step("keeping the way back")
        write_delta(files, staging.model, prepared.companions)
    outputs = {file.name: staging.finished[file.name][0] for file in plan.files}
    outputs |= {name: digest_of(path) for name, path in _files_in(staging.model).items() if name not in outputs}
    adapters = [
        {name: digest_of(path) for name, path in files_of_adapter(source).items()} for source in prepared.sources
    ]
    from_cache = [name for name, path in files.paths.items() if digest_in_cache(path) is not None]
    manifest = manifest_of(prepared, inputs, from_cache, adapters, outputs, figures)
    prepared.warnings += warnings_of(figures, bool(prepared.changes.whole_modules), prepared.options.rounding)
    write_manifest(staging.model, manifest)
    return manifest


def _write_companions(prepared: PreparedMerge, folder: Path) -> None:
    """Write the index, the companion files and the config."""
    base = prepared.base
    index_name = f"{MODEL_STEM}{INDEX}"
    metadata = base.json(index_name).get("metadata", {}) if base.has(index_name) else {}
    index = index_of(prepared.plan.files, metadata if isinstance(metadata, Mapping) else {})
    if index is not None:
        (folder / index_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    prepared.warnings += copy_companions(base.root, folders_of(reversed(prepared.sources)), folder)
    _write_config(base, prepared.config, folder / MODEL_CONFIG)


def _write_config(base: Source, changes: Mapping[str, Any], target: Path) -> None:
    """Write the base's config, byte for byte where nothing has to change."""
    if not changes:
        shutil.copyfile(base.path(MODEL_CONFIG), target)
        return
    values = base.json(MODEL_CONFIG)
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        # Some keys stand in the config of each part of a model too.
        changed = changes if part is values else {k: v for k, v in changes.items() if k in part and k in _NESTED}
        part.update({key: value for key, value in changed.items() if value is not ...})
        for key in [key for key, value in changed.items() if value is ...]:
            part.pop(key, None)
    target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_NESTED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "vocab_size")


def _files_in(folder: Path) -> dict[str, Path]:
    """List every file in a folder, by its path from there."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _report(prepared: PreparedMerge, target: Path, manifest: Mapping[str, Any], seconds: float) -> MergeReport:
    files = list(_files_in(target))
    adapters = [
        adapter.checkpoint.origin + ("" if adapter.weight == 1.0 else f" x {adapter.weight:g}")
        for adapter in prepared.adapters
    ]
    return MergeReport(
        adapter=" + ".join(adapters),
        base=prepared.base_text,
        out=str(target),
        layers=len(prepared.changes.layers),
        saved_modules=sorted(prepared.changes.whole_modules),
        untied=prepared.plan.untied,
        dtype=str(DTYPES[prepared.plan.dtype]).removeprefix("torch."),
        nbytes=sum((target / name).stat().st_size for name in files),
        files=files,
        changed_tensors=manifest["summary"]["changed_tensors"],
        survives=manifest["summary"]["survives"],
        seconds=seconds,
        warnings=list(dict.fromkeys(prepared.warnings)),
    )
