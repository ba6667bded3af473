"""What a merge writes: the weights, what comes along beside them, and the manifest."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.checkpoints.torch_dtypes import DTYPES
from veneer.files.atomic_write import writing
from veneer.files.names import INDEX, MODEL_CONFIG, MODEL_STEM
from veneer.files.source import Source
from veneer.merging.base.companion_files import copy_companions, files_of_adapter
from veneer.merging.base.hashing import Hashing, sha256_of, stamp_of
from veneer.merging.output.file_writer import FileSink, write_files
from veneer.merging.output.manifest import manifest_of, warnings_of, write_manifest
from veneer.merging.output.merge_report import MergeReport
from veneer.merging.output.staging import StagingFolder, check_apart, check_space, workshop
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
        hashing: of the base's files; what it has begun is used.
        reversible: keep what restores the base.
        resume: go on where a merge of the same was killed.
        overwrite: replace a model that is at ``target``.
        on_step: called with what begins now.
        started: when the merge began, by ``time.perf_counter``.

    Raises:
        OutputError, MergeError: as :func:`veneer.merge` raises it.
    """
    check_apart(target, [("base", prepared.base.root), *(("adapter", source.root) for source in prepared.sources)])
    with writing(target), workshop(target, _made_from(prepared), resume, overwrite) as shop:
        manifest = _write(prepared, shop, hashing, reversible, on_step)
        prepared.check_unchanged()
        shop.commit()
    return _report(prepared, target, manifest, time.perf_counter() - started)


def _made_from(prepared: PreparedMerge) -> dict[str, Any]:
    """What tells one output from another: inputs by size and time of change, options, layout."""
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
    prepared: PreparedMerge, shop: StagingFolder, hashing: Hashing, reversible: bool, on_step: Callable[[str], None]
) -> dict[str, Any]:
    """Write everything into the workshop, the weights first and the config last; the manifest is returned."""
    plan, files = prepared.plan, prepared.files
    todo = [file for file in plan.files if file.name not in shop.finished]
    check_space(shop.target, sum(file.nbytes for file in todo))
    on_step("merging")
    sink = FileSink(shop.model, plan.files)
    hashing.expect(files.paths, files.at_opening)
    try:
        write_files(todo, plan.pieces, sink, lambda file, digest, own: shop.record(file.name, digest, own))
        on_step("writing")
        inputs = hashing.result()
    finally:
        sink.close()
    figures = [one for file in plan.files for one in shop.finished[file.name][1]]
    prepared.check_unchanged()
    _write_small(prepared, shop.model)
    inputs |= {name: sha256_of(path) for name, path in prepared.companions.items()}
    if reversible:
        on_step("keeping the way back")
        write_delta(files, shop.model, prepared.companions)
    outputs = {file.name: shop.finished[file.name][0] for file in plan.files}
    outputs |= {name: sha256_of(path) for name, path in _files_in(shop.model).items() if name not in outputs}
    adapters = [
        {name: sha256_of(path) for name, path in files_of_adapter(source).items()} for source in prepared.sources
    ]
    manifest = manifest_of(prepared, inputs, adapters, outputs, figures)
    prepared.warnings += warnings_of(figures, bool(prepared.changes.whole_modules), prepared.options.rounding)
    write_manifest(shop.model, manifest)
    return manifest


def _write_small(prepared: PreparedMerge, folder: Path) -> None:
    """Index, small files and config."""
    base = prepared.base
    own_index = f"{MODEL_STEM}{INDEX}"
    metadata = base.json(own_index).get("metadata", {}) if base.has(own_index) else {}
    index = index_of(prepared.plan.files, metadata if isinstance(metadata, Mapping) else {})
    if index is not None:
        (folder / own_index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    prepared.warnings += copy_companions(base.root, [source.root for source in reversed(prepared.sources)], folder)
    _write_config(base, prepared.config, folder / MODEL_CONFIG)


def _write_config(base: Source, changes: Mapping[str, Any], target: Path) -> None:
    """The base's config, byte for byte where nothing has to change."""
    if not changes:
        shutil.copyfile(base.path(MODEL_CONFIG), target)
        return
    values = base.json(MODEL_CONFIG)
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        # A model of several parts says some things for each of them.
        own = changes if part is values else {k: v for k, v in changes.items() if k in part and k in _NESTED}
        part.update({key: value for key, value in own.items() if value is not ...})
        for key in [key for key, value in own.items() if value is ...]:
            part.pop(key, None)
    target.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_NESTED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "vocab_size")


def _files_in(folder: Path) -> dict[str, Path]:
    """Every file in a folder, by its path from there."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _report(prepared: PreparedMerge, target: Path, manifest: Mapping[str, Any], seconds: float) -> MergeReport:
    files = list(_files_in(target))
    told = [
        adapter.checkpoint.origin + ("" if adapter.weight == 1.0 else f" x {adapter.weight:g}")
        for adapter in prepared.adapters
    ]
    return MergeReport(
        adapter=" + ".join(told),
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
