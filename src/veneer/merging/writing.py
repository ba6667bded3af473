"""What a merge writes: the weights, what comes along beside them, and the manifest."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.adapter_set import SET_FILE
from veneer.dtypes import DTYPES
from veneer.errors import MergeError
from veneer.merging.hashing import Hashing, sha256_of
from veneer.merging.layout import index_of
from veneer.merging.manifest import MANIFEST, manifest_of, warnings_of, write_manifest
from veneer.merging.output import Workshop, check_space, told_as_merge_error, workshop
from veneer.merging.prepare import Prepared
from veneer.merging.report import MergeReport
from veneer.merging.stream import FileSink, write_files
from veneer.merging.undo import DELTA, write_delta
from veneer.source import INDEX, MODEL_CONFIG, MODEL_STEM, Source

# Written for the output, or about something else than the output.
_OWN = (MODEL_CONFIG, ".gitattributes", "README.md", "trainer_state.json", SET_FILE, MANIFEST)
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
)
_FOLDERS = ("additional_chat_templates",)


def write_folder(
    prepared: Prepared,
    target: Path,
    hashing: Hashing,
    reversible: bool,
    resume: bool,
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
        on_step: called with what begins now.
        started: when the merge began, by ``time.perf_counter``.

    Raises:
        MergeError: as :func:`veneer.merge` raises it.
    """
    if target.resolve() == prepared.base.root.resolve():
        raise MergeError(f"{target} is the base itself; a merge does not replace it.", hint="Choose another folder.")
    with told_as_merge_error(target), workshop(target, _made_from(prepared), resume) as shop:
        manifest = _write(prepared, shop, hashing, reversible, on_step)
        prepared.files.check_unchanged()
        shop.commit()
    return _report(prepared, target, manifest, time.perf_counter() - started)


def _made_from(prepared: Prepared) -> dict[str, Any]:
    """What tells one output from another: inputs by size and time of change, options, layout."""
    adapters = [
        {path.name: list(_stamp(path)) for path in sorted(source.root.glob("adapter_*")) if path.is_file()}
        for source in prepared.sources
    ]
    return {
        "base": {name: list(stamp) for name, stamp in prepared.files.stamps().items()},
        "adapters": adapters,
        "weights": [adapter.weight for adapter in prepared.adapters],
        "options": prepared.options.to_dict(),
        "files": {file.name: file.nbytes for file in prepared.plan.files},
    }


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _write(
    prepared: Prepared, shop: Workshop, hashing: Hashing, reversible: bool, on_step: Callable[[str], None]
) -> dict[str, Any]:
    """Write everything into the workshop, the weights first and the config last; the manifest is returned."""
    plan, files = prepared.plan, prepared.files
    todo = [file for file in plan.files if file.name not in shop.finished]
    check_space(shop.target, sum(file.nbytes for file in todo))
    on_step("merging")
    sink = FileSink(shop.model, plan.files)
    hashing.expect(files.paths, files.at_opening)
    try:
        write_files(todo, plan.works, sink, lambda file, digest, own: shop.record(file.name, digest, own))
        on_step("writing")
        inputs = hashing.result()
    finally:
        sink.close()
    figures = [one for file in plan.files for one in shop.finished[file.name][1]]
    _write_small(prepared, shop.model)
    index = prepared.base.path(f"{MODEL_STEM}{INDEX}")
    beside = [*_small(prepared.base.root), *([index] if index.is_file() else [])]
    inputs |= {path.name: sha256_of(path) for path in beside}
    outputs = {file.name: shop.finished[file.name][0] for file in plan.files}
    outputs |= {p.name: sha256_of(p) for p in sorted(shop.model.iterdir()) if p.is_file() and p.name not in outputs}
    if reversible:
        on_step("keeping the way back")
        write_delta(files, shop.model, beside)
        outputs |= {f"{DELTA}/{path.name}": sha256_of(path) for path in sorted((shop.model / DELTA).iterdir())}
    adapters = [
        {path.name: sha256_of(path) for path in sorted(source.root.glob("adapter_*")) if path.is_file()}
        for source in prepared.sources
    ]
    manifest = manifest_of(prepared, inputs, adapters, outputs, figures)
    prepared.warnings += warnings_of(figures, bool(prepared.changes.roots), prepared.options.rounding)
    write_manifest(shop.model, manifest)
    return manifest


def _write_small(prepared: Prepared, folder: Path) -> None:
    """Index, small files and config."""
    base = prepared.base
    own_index = f"{MODEL_STEM}{INDEX}"
    metadata = base.json(own_index).get("metadata", {}) if base.has(own_index) else {}
    index = index_of(prepared.plan.files, metadata if isinstance(metadata, Mapping) else {})
    if index is not None:
        (folder / own_index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for source in (base, *reversed(prepared.sources)):
        _bring_along(source.root, folder)
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


def _bring_along(origin: Path, folder: Path) -> None:
    """Copy the small files beside a checkpoint: tokenizer, chat template, licence ..."""
    for path in _small(origin):
        if path.name != MODEL_CONFIG:
            shutil.copyfile(path, folder / path.name)
    for name in _FOLDERS:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, dirs_exist_ok=True)


def _small(origin: Path) -> list[Path]:
    """The files beside a checkpoint's weights that belong to the model, its config among them."""
    return [
        path
        for path in sorted(origin.iterdir())
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith(("adapter_", "."))
        if path.name == MODEL_CONFIG or path.name not in _OWN
    ]


def _report(prepared: Prepared, target: Path, manifest: Mapping[str, Any], seconds: float) -> MergeReport:
    files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    told = [
        adapter.checkpoint.origin + ("" if adapter.weight == 1.0 else f" x {adapter.weight:g}")
        for adapter in prepared.adapters
    ]
    return MergeReport(
        adapter=" + ".join(told),
        base=prepared.base_text,
        out=str(target),
        layers=len(prepared.changes.layers),
        saved_modules=sorted(prepared.changes.roots),
        untied=prepared.plan.untied,
        dtype=str(DTYPES[prepared.plan.dtype]).removeprefix("torch."),
        nbytes=sum((target / name).stat().st_size for name in files),
        files=files,
        changed_tensors=manifest["summary"]["changed_tensors"],
        survives=manifest["summary"]["survives"],
        seconds=seconds,
        warnings=list(dict.fromkeys(prepared.warnings)),
    )
