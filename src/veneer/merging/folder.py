"""From adapters and their base to a folder with a plain model, which needs neither. The base is never in memory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.adapter_set import SET_FILE
from veneer.dtypes import DTYPES
from veneer.errors import MergeError
from veneer.merging.layout import index_of
from veneer.merging.manifest import MANIFEST, manifest_of, warnings_of, write_manifest
from veneer.merging.output import Workshop, check_space, check_target, told_as_merge_error, workshop
from veneer.merging.prepare import Adapters, Prepared, Where, options_of, prepare
from veneer.merging.stream import FileSink, Hashing, sha256_of, write_files
from veneer.merging.undo import DELTA, write_delta
from veneer.panel import panel
from veneer.source import INDEX, MODEL_CONFIG, MODEL_STEM, Source

if TYPE_CHECKING:
    from rich.console import RenderableType

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


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        adapter: the adapters' paths or ids, with their weights where they are not 1.
        base: the base model and why it was this one.
        out: the folder that was written.
        layers: adapted layers merged.
        saved_modules: modules of the adapters that replaced the base's.
        untied: parameters that shared a tensor in the base and no longer do.
        dtype: of the merged weights.
        nbytes: bytes written.
        files: their names.
        changed_tensors: how many of the weights changed.
        survives: the share of the change's energy that rounding to ``dtype`` leaves.
        seconds: from start to end.
        warnings: what a user should know.
    """

    adapter: str
    base: str
    out: str
    layers: int
    saved_modules: list[str]
    untied: list[str]
    dtype: str
    nbytes: int
    files: list[str]
    changed_tensors: int
    survives: float
    seconds: float
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """A panel with one row a fact."""
        return panel("merge report", self._facts(), self.warnings)

    def _facts(self) -> list[tuple[str, str]]:
        merged = f"{self.layers} layers" + (f" and {', '.join(self.saved_modules)}" if self.saved_modules else "")
        share = f"{100 * self.survives:.2f} % of the change is left after rounding to {self.dtype}"
        facts = [
            ("adapter", self.adapter),
            ("base", self.base),
            ("merged", f"{merged}: {self.changed_tensors} tensors changed"),
            ("rounding", share),
            ("out", f"{self.out}: {len(self.files)} files, {self.nbytes / 1e6:.1f} MB, {self.dtype}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return facts if not self.untied else [*facts, ("untied", ", ".join(self.untied))]


def merge(
    adapter: Adapters,
    base: str | Path | None = None,
    *,
    out: str | Path,
    dtype: Any = "auto",
    max_shard_size: str | int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    dequantize: bool = False,
    reversible: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    task: str | None = None,
    strict: bool = True,
    strict_base: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> MergeReport:
    """Merge adapters into their base and write the result as a plain model folder.

    The weights go from disk to disk in blocks, so that memory does not grow with the model: float32 arithmetic,
    rounded once. What no adapter changes is copied byte for byte, tensors that only the base has included. The
    output appears only when it is complete, with a ``merge_manifest.json`` beside the weights. Tokenizer, chat
    template, licence and other small files come along, the adapter's own before the base's; no adapter file does.

    Args:
        adapter: an adapter's folder or hub id; or several, merged in their order; or a mapping from each to the
            weight that its change is multiplied by, defined for those that add to the weights.
        base: the base; by default what the (first) adapter's config names.
        out: the folder to write. It must not exist or be empty, unless ``overwrite``.
        dtype: of the merged weights; ``"auto"`` keeps the base's.
        max_shard_size: bytes in one weight file, as a number or such as ``"5GB"``; the base's division if ``None``.
        rounding: ``"nearest"``, or ``"stochastic"``: up or down so that the expected value is exact.
        seed: of the stochastic rounding.
        dequantize: turn a base in float8 into plain numbers (bfloat16, unless ``dtype``) while merging.
        reversible: keep, compressed beside the weights, what :func:`veneer.unmerge` needs to restore the base.
        overwrite: replace what is at ``out``.
        resume: go on where a merge of the same inputs to ``out`` was killed; one that fails can be resumed too.
        task: what the model is for; by default what the adapter says.
        strict: raise when adapter and base do not fit; else merge what fits and warn.
        strict_base: raise when the base is not the one that the adapter records; else warn.
        revision: of the adapter on the hub.
        base_revision: of the base on the hub.
        subfolder: where in ``adapter`` to look.
        token: for the hub.
        local_files_only: never use the network.
        trust_remote_code: run code that comes with the base model.
        on_step: called with what begins now, for a progress display.

    Raises:
        MergeError: ``out`` is taken or cannot be written, ``adapter`` is no adapter, the merged weights are not
            finite, a file changed meanwhile. SourceError, ConfigError, BaseModelError, BindError: as loading raises.
    """
    started = time.perf_counter()
    target = Path(out)
    if target.is_symlink():  # the folder it leads to is written, and the link stays
        target = target.resolve()
    check_target(target, overwrite)
    on_step("loading")
    options = options_of(
        dtype,
        max_shard_size,
        rounding=rounding,
        seed=seed,
        dequantize=dequantize,
        task=task,
        strict=strict,
    )
    where = Where(revision, base_revision, subfolder, token, local_files_only, trust_remote_code)
    prepared = prepare(adapter, base, options, where, strict_base)
    try:
        if target.resolve() == prepared.base.root.resolve():
            raise MergeError(
                f"{target} is the base itself; a merge does not replace it.", hint="Choose another folder."
            )
        with told_as_merge_error(target), workshop(target, _made_from(prepared), resume) as shop:
            manifest = _write(prepared, shop, reversible, on_step)
            prepared.files.check_unchanged()
            shop.commit()
    finally:
        prepared.files.close()
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


def _write(prepared: Prepared, shop: Workshop, reversible: bool, on_step: Callable[[str], None]) -> dict[str, Any]:
    """Write everything into the workshop, the weights first and the config last; the manifest is returned."""
    plan, files = prepared.plan, prepared.files
    todo = [file for file in plan.files if file.name not in shop.finished]
    check_space(shop.target, sum(file.nbytes for file in todo))
    on_step("merging")
    sink = FileSink(shop.model, plan.files)
    hashing = Hashing(files.paths)
    try:
        write_files(todo, plan.works, sink, lambda file, digest, own: shop.record(file.name, digest, own))
        on_step("writing")
        inputs = hashing.result()
    finally:
        sink.close()
        hashing.close()
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
