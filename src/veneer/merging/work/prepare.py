"""What a merge is made from: the adapters and the base, found, read by their headers and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.merge.new_bias import new_biases
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.find_base import find_base, kind_of
from veneer.checkpoints.model_class import dtype_of, note_of
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.checkpoints.resized_vocabulary import required_vocabulary
from veneer.checkpoints.torch_dtypes import DTYPES
from veneer.configs.patterns import matching
from veneer.errors import BaseMismatchError, BaseModelError, ConfigError, MergeError
from veneer.files import adapter_folders
from veneer.files.base_config import part_of
from veneer.files.base_digest import BASE_DIGEST_KEY, base_digest
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import INDEX, MODEL_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.merging.base.companion_files import beside, check_inside, files_of_adapter
from veneer.merging.base.hashing import Stamp, check_unchanged, stamps_of
from veneer.merging.base.plain_skeleton import plain_skeleton, plainly_stored
from veneer.merging.base.quantized_tensors import as_in_model, packed_tensors
from veneer.merging.base.repeated_files import repeated_blocks
from veneer.merging.base.skeleton import DiskReader, build_skeleton, resize_vocabulary, stored_names
from veneer.merging.base.weight_files import FLOATS, NAMES, WeightFiles, open_weights
from veneer.merging.work.adapter_changes import AdapterChanges, WeightedAdapter, bind_adapters
from veneer.merging.work.file_layout import size_in_bytes
from veneer.merging.work.inputs import AdapterPaths, weighted
from veneer.merging.work.merge_plan import MergePlan, Planner, config_changes
from veneer.merging.work.pieces import StoredTensor
from veneer.merging.work.rounding import NEAREST, Rounding
from veneer.printing import warn


@dataclass(frozen=True)
class Options:
    """How a merge is done; all of it is recorded in the manifest.

    Attributes:
        dtype: of the merged weights; ``"auto"`` keeps each tensor's.
        max_shard_size: bytes of tensors in one file; the base's division when ``None``.
        rounding: ``"nearest"`` or ``"stochastic"``.
        seed: of the stochastic rounding.
        dequantize: whether a quantised base is turned into plain numbers first.
        task: what the model is for; by default what the adapter says.
        strict: refuse adapters that do not fit.
    """

    dtype: str = "auto"
    max_shard_size: int | None = None
    rounding: str = NEAREST
    seed: int = 0
    dequantize: bool = False
    task: str | None = None
    strict: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types."""
        return asdict(self)


_DTYPES = [str(DTYPES[name]).removeprefix("torch.") for name in FLOATS]


def options_of(dtype: Any, max_shard_size: str | int | None, **others: Any) -> Options:
    """Options from what a caller gives."""
    found = dtype_of(dtype)
    if found not in ("auto", None) and NAMES.get(found) not in FLOATS:
        raise ConfigError(f"dtype={dtype!r} is none of a model's weights.", hint=f"Known: auto, {', '.join(_DTYPES)}.")
    name = "auto" if found in ("auto", None) else str(found).removeprefix("torch.")
    return Options(name, None if max_shard_size is None else size_in_bytes(max_shard_size), **others)


@dataclass
class PreparedMerge:
    """A merge that is ready to be written, or to be replayed.

    Attributes:
        adapters: what is merged, in order.
        sources: the adapters' folders.
        base: the base's folder.
        base_text: which base, and why.
        files: the base's weight files, open.
        changes: what the adapters do.
        plan: the work.
        config: keys of the base's config that the output has otherwise; ``...`` removes one.
        options: how it is done.
        small: the base's files that are no weights: name -> path.
        read: what is read beside the base's weights -> what it was at the start.
        warnings: what a user should know.
    """

    adapters: list[WeightedAdapter]
    sources: list[Source]
    base: Source
    base_text: str
    files: WeightFiles
    changes: AdapterChanges
    plan: MergePlan
    config: dict[str, Any]
    options: Options
    small: dict[str, Path]
    read: dict[Path, Stamp]
    warnings: list[str] = field(default_factory=list)

    def check_unchanged(self) -> None:
        """Raise ``MergeError`` when the base or an adapter is no longer what it was at the start."""
        self.files.check_unchanged()
        check_unchanged(self.read)


def find_adapters(adapters: AdapterPaths, lookup: LookupOptions) -> tuple[list[Source], list[float]]:
    """The adapters' folders in their order, and their weights. A set stands for those of it that are active."""
    pairs = weighted(adapters)
    if not pairs:
        raise MergeError("There is no adapter to merge.", hint="Give its path.")
    sources: list[Source] = []
    weights: list[float] = []
    for path, weight in pairs:
        source = resolve(path, lookup)
        members = adapter_folders.members(source)
        kind = kind_of(source, members)
        if kind == "model":
            raise MergeError(f"{path} is a full model; there is nothing to merge.", hint="Give an adapter's path.")
        names = adapter_folders.active(source, members) if members else []
        own = [next(m.source for m in members if m.name == name) for name in names] or [source]
        sources += own
        weights += [weight] * len(own)
    return sources, weights


def prepare(
    adapters: AdapterPaths,
    base: str | Path | None,
    options: Options,
    lookup: LookupOptions,
    strict_base: bool = False,
) -> PreparedMerge:
    """Find and plan everything; no weight is read.

    Raises:
        SourceError, ConfigError: something cannot be read. BaseModelError: no usable base. BindError: they do not
        fit. MergeError: they cannot be merged.
    """
    sources, weights = find_adapters(adapters, lookup)
    checkpoints = [open_checkpoint(source, strict=options.strict) for source in sources]
    merged = [WeightedAdapter(checkpoint, weight) for checkpoint, weight in zip(checkpoints, weights, strict=True)]
    found = find_base(sources[0], checkpoints, base, lookup)
    small = _small(found.source)
    own = [
        path for source in sources for part in (files_of_adapter(source), beside(source.root)) for path in part.values()
    ]
    read = stamps_of([*small.values(), *own])
    files = open_weights(found.source)
    try:
        told = _check_identity(merged, found.source, strict_base)
        with matching(*(checkpoint.config for checkpoint in checkpoints), where=", ".join(s.origin for s in sources)):
            return _planned(merged, sources, found, files, options, lookup, told, small, read)
    except BaseException:
        files.close()
        raise


def _planned(
    merged: list[WeightedAdapter],
    sources: list[Source],
    found: Any,
    files: WeightFiles,
    options: Options,
    lookup: LookupOptions,
    told: list[str],
    small: dict[str, Path],
    read_at_start: dict[Path, Stamp],
) -> PreparedMerge:
    source: Source = found.source
    checkpoints = [adapter.checkpoint for adapter in merged]
    build: Any = partial(build_skeleton, source, checkpoints, options.task, lookup.trust_remote_code)
    repeated = repeated_blocks(checkpoints, source, build)
    base = files if repeated is None else repeated.seen_in(files)
    deeper = {} if repeated is None else dict(repeated.config)
    skeleton: Any = partial(build, **deeper)
    packed = packed_tensors(source, base, options.dequantize)
    parts = {part for one in packed.values() for part in one.parts}
    shapes = {name: place.info.shape for name, place in base.places.items() if name not in parts}
    shapes |= {name: one.shape for name, one in packed.items()}
    vocabulary = _vocabulary(checkpoints, source, options.task)
    model = None if vocabulary is not None else plain_skeleton(source, base, checkpoints, options.task, **deeper)
    stored = plainly_stored(base) if model is not None else None
    if model is None or stored is None:
        model = skeleton()
        told += note_of(type(model), source.json(MODEL_CONFIG), checkpoints, options.task)
        stored = stored_names(model, shapes, shapes)
    packed = as_in_model(packed, model, stored.direct)
    lengths = {} if vocabulary is None else resize_vocabulary(model, vocabulary, stored)
    if not stored.direct and not stored.made:
        raise BaseModelError(
            f"No tensor of {source.origin} belongs to its own model class, {type(model).__name__}.",
            hint="Check that config and weights are from the same model.",
        )
    reader = DiskReader(
        model, stored, lambda name: StoredTensor(base, name, packed.get(name), lengths.get(name)).whole()
    )
    changes = bind_adapters(merged, model, reader, options.strict)
    dtype = None if options.dtype == "auto" else dtype_of(options.dtype)
    rounding = Rounding(options.rounding, options.seed)
    biases = new_biases(changes.layers.values(), list(changes.weights), model, skeleton)
    planner = Planner(model, base, stored, changes, dtype, rounding, packed, biases, lengths)
    own_size = None if repeated is None else repeated.file_size(files)
    plan = planner.plan(options.max_shard_size or own_size)
    config = {
        **_config(source, model, dtype or (planner.common if packed else None)),
        **deeper,
        **biases.config,
        **({} if vocabulary is None else {"vocab_size": vocabulary}),
        **config_changes(plan, model, lambda: skeleton(tie_word_embeddings=False)),
    }
    if plan.missing:
        told.append(
            f"{len(plan.missing)} weights of {type(model).__name__} are not in the base and start random when the "
            f"output is loaded: {', '.join(plan.missing[:3])}."
        )
    if vocabulary is not None:
        told.append(f"The base's vocabulary was resized to {vocabulary} tokens, as the adapter's.")
    if repeated is not None:
        told.append(f"The output has {len(repeated.order)} blocks, each from one of the base's (layer_replication).")
    told += changes.notes
    text = f"{source.origin}, {found.why}"
    return PreparedMerge(
        merged, sources, source, text, files, changes, plan, config, options, small, read_at_start, told
    )


def _small(base: Source) -> dict[str, Path]:
    """The base's files that are no weights, its index among them."""
    index = f"{MODEL_STEM}{INDEX}"
    if base.has(index):
        check_inside(base.root, [base.path(index)])
    return {**beside(base.root), **({index: base.path(index)} if base.has(index) else {})}


def _vocabulary(checkpoints: Sequence[Checkpoint], source: Source, task: str | None) -> int | None:
    """The vocabulary that the output has where it is not the base's."""
    wanted = task or next((c.config.task_type for c in checkpoints if c.config.task_type), None)
    return required_vocabulary(checkpoints, source, source.json(MODEL_CONFIG), str(wanted) if wanted else None)


def _config(source: Source, model: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the output's class, head, dtype and form ask of its config."""
    values, changed = source.json(MODEL_CONFIG), dict[str, Any]()
    kind = type(model).__name__
    if kind not in (values.get("architectures") or []):
        changed["architectures"] = [kind]
    own = model.config.to_dict()
    head = {key: own[key] for key in ("id2label", "label2id") if own.get(key)}
    if _labels(values, source.origin) != _labels(head, source.origin):
        changed.update({**head, "num_labels": ...} if "num_labels" in values else head)
    if "quantization_config" in values:
        changed["quantization_config"] = ...
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        changed[key] = str(dtype).removeprefix("torch.")
    return changed


def _labels(config: Mapping[str, Any], origin: str) -> int:
    """How many labels a config names; two, as transformers has it, where it names none."""
    return len(part_of(config, "id2label", origin) or ()) or 2


def _check_identity(merged: Sequence[WeightedAdapter], base: Source, strict_base: bool) -> list[str]:
    """Compare the base with the one that each adapter records."""
    told: list[str] = []
    for adapter in merged:
        recorded = adapter.checkpoint.metadata.get(BASE_DIGEST_KEY)
        if recorded is None or recorded == base_digest(base):
            continue
        message = f"The adapter {adapter.checkpoint.origin} was trained on another base than {base.origin}."
        if strict_base:
            raise BaseMismatchError(message, hint="Give the base that it was trained on.")
        warn(message + " The merged model may answer differently.")
        told.append(message)
    return told
