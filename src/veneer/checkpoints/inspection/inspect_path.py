"""Inspects a path by configs and headers: imports no torch, reads no weights, uses no network for local files.

Whatever is broken is described in ``problems``, with its mend, and not raised.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from veneer.checkpoints.inspection.facts import PEFT, AdapterFacts, ModelFacts, PathFacts, Problem
from veneer.checkpoints.inspection.foreign_facts import foreign_facts
from veneer.checkpoints.inspection.next_step import generate_command, weights_in_memory
from veneer.checkpoints.inspection.problems import (
    base_problems,
    empty_checkpoint,
    model_and_adapter,
    no_adapter_config,
    no_checkpoint,
    problem_of,
)
from veneer.checkpoints.inspection.weights import headers_of, remote_headers, weights_of
from veneer.configs.base import PeftConfig, config_class
from veneer.configs.names import HEADS
from veneer.configs.value_checks import matches_type
from veneer.errors import (
    ConfigError,
    CorruptFileError,
    SourceError,
    UnknownMethodError,
    VeneerError,
)
from veneer.files import adapter_folders
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.files.hub import is_offline
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    ADAPTER_WEIGHTS,
    INDEX,
    MODEL_CONFIG,
    MODEL_STEM,
    SAFETENSORS,
)
from veneer.files.resolve import resolve
from veneer.files.safetensors_header import TensorInfo, read_header
from veneer.files.source import PICKLES, Source
from veneer.files.tensor_keys import PREFIX
from veneer.formats.expert_layouts import leaves_order_unsaid, unsaid_order
from veneer.formats.foreign import check_is_adapter_file, foreign
from veneer.keywords import TOKEN, takes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from veneer.formats.format import Format


# The files of a hub repository that tell what it is; of weights only the headers are read.
_SMALL = ("*.json",)
# Keys of a config that are shown, and the types that their values may have.
_ADAPTER_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("peft_type", "base_model_name_or_path", "revision", "task_type"), str),
    "lora_alpha": int | float,
    "num_virtual_tokens": int,
    "target_modules": str | list[str],
    "modules_to_save": list[str],
}
_MODEL_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), str),
    "architectures": list[str],
    "quantization_config": dict[str, Any],
    "tie_word_embeddings": bool,
}
# Leaves whose first dimension is a rank, and of which an adapted layer has one; in memory they have the adapter's name.
_DOWN = re.compile(r"\.lora_(A(\.[^.]+)?\.weight|embedding_A(\.[^.]+)?)$")


@dataclass(frozen=True)
class Inspection(PathFacts):
    """Holds the facts of a path; rich prints it as a panel with a row for each."""

    adapters: dict[str, Inspection] = field(default_factory=dict)

    def __rich__(self) -> RenderableType:
        """Return a panel: the facts, a line for each member of a set, then the problems."""
        from veneer.checkpoints.inspection.text import as_panel

        return as_panel(self)


@takes(renamed=TOKEN)
def inspect(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Inspection:
    """Tell what is at a local folder, a safetensors file or a hub id.

    Args:
        path: what to look at.
        revision: branch, tag or commit on the hub.
        subfolder: where below it to look.
        token: for the hub.
        local_files_only: use no network.

    Raises:
        PathNotFoundError: nothing is there. NotACheckpointError: it is a file, and no checkpoint.
    """
    lookup = LookupOptions(revision, subfolder, token, local_files_only)
    source = resolve(path, lookup, patterns=_SMALL)
    if source.commit is not None and source.has(ADAPTER_CONFIG):
        source = resolve(path, lookup)
    # Headers of weights that are not in the cache are asked for at the hub's root, and only where it may be asked.
    ask = source.commit is not None and not (subfolder or local_files_only or is_offline())
    inspection = _inspect(source, os.fspath(path), token, ask)
    if inspection.problems or source.file is not None or _is_foreign_without_base(inspection):
        return inspection
    place = f"{source.root}" if subfolder and source.commit is None else os.fspath(path)
    return replace(
        inspection,
        memory=weights_in_memory(inspection, source),
        next_command=None if subfolder and source.commit else generate_command(inspection, place, revision),
    )


def _is_foreign_without_base(inspection: Inspection) -> bool:
    """Tell whether an adapter is in another tool's format, and does not name its base: it may be for images."""
    adapter = inspection.adapter
    return adapter is not None and adapter.format != PEFT and adapter.base is None


def _inspect(
    source: Source, path: str, token: str | None = None, ask: bool = False, in_set: bool = False
) -> Inspection:
    problems: list[Problem] = []
    try:
        other_format = foreign(source)
    except VeneerError as error:
        return Inspection(path, "unknown", commit=source.commit, problems=(problem_of("damaged", error),))
    if other_format is not None:
        return _inspect_foreign(source, path, other_format, problems)
    if source.file is not None:
        return _inspect_file(source, path)
    has_adapter, has_model = source.has(ADAPTER_CONFIG), source.has(MODEL_CONFIG)
    adapter = _adapter(source, problems) if has_adapter else None
    model = _model(source, problems, token, ask, alone=not has_adapter) if has_model else None
    members = [] if in_set else _members(source, problems)
    adapters = {m.name: _inspect(m.source, m.source.origin, in_set=True) for m in members if m.source != source}
    problems += [Problem(p.code, f"{name}: {p.message}", p.hint) for name, a in adapters.items() for p in a.problems]
    if has_adapter and model is not None and model.weights is not None:
        problems.append(model_and_adapter(source))
    if has_adapter or adapters:
        # An adapter beside a config without weights is an adapter: some tools copy the base's config there.
        kind = "model+adapter" if model is not None and model.weights is not None else "adapter"
    else:
        kind = "model" if has_model else "unknown"
    if kind == "unknown":
        problems.append(no_checkpoint(source))
    return Inspection(path, kind, adapter, model, adapters, source.commit, tuple(problems))


def _inspect_foreign(source: Source, path: str, other_format: Format, problems: list[Problem]) -> Inspection:
    """Inspect another tool's adapter."""
    facts = None
    try:
        facts = foreign_facts(source, other_format, problems)
    except CorruptFileError as error:
        problems.append(problem_of("damaged", error))
    return Inspection(path, "adapter", facts, commit=source.commit, problems=tuple(problems))


def _members(source: Source, problems: list[Problem]) -> list[adapter_folders.Member]:
    try:
        return adapter_folders.members(source)
    except SourceError as error:
        problems.append(problem_of("damaged", error))
        return []


def _inspect_file(source: Source, path: str) -> Inspection:
    """Inspect a single safetensors file: an adapter's when its keys say so."""
    assert source.file is not None
    check_is_adapter_file(source)
    header = read_header(source.file)
    weights = weights_of([header])
    beside = source.file.name == ADAPTER_WEIGHTS and source.has(ADAPTER_CONFIG)
    if beside:
        return _inspect(Source(source.root, path), path)
    ranks = _ranks(header.tensors.values())
    if ranks or any(name.startswith("base_model.") for name in header.tensors):
        digest = header.metadata.get(BASE_DIGEST_KEY)
        facts = AdapterFacts(None, None, None, digest, None, ranks, None, {}, None, None, sum(ranks.values()), weights)
        return Inspection(path, "adapter", adapter=facts, problems=(no_adapter_config(path),))
    facts_of_model = ModelFacts(None, None, None, None, None, weights)
    return Inspection(path, "model", model=facts_of_model)


# -- an adapter --------------------------------------------------------------------------------------------


def _adapter(source: Source, problems: list[Problem]) -> AdapterFacts:
    """Return the facts of an adapter's folder; what is wrong with it joins ``problems``."""
    values: dict[str, Any] = {}
    try:
        values = source.json(ADAPTER_CONFIG)
        _check_config(values, source, problems)
    except SourceError as error:
        problems.append(problem_of("damaged", error))
    if leaves_order_unsaid(values):
        problems.append(problem_of("experts", unsaid_order(source.origin)))
    headers = headers_of(source, ADAPTER_STEM, problems)
    weights = weights_of(headers) if headers else None
    if weights is not None and not weights.parameters:
        problems.append(empty_checkpoint(source))
    values = _typed(values, _ADAPTER_TYPES, f"{source.origin}/{ADAPTER_CONFIG}", problems)
    problems += base_problems(values.get("base_model_name_or_path"), source)
    tensors = [info for header in headers for info in header.tensors.values()]
    ranks = _ranks(tensors)
    recorded = [header.metadata.get(BASE_DIGEST_KEY) for header in headers]
    return AdapterFacts(
        peft_type=values.get("peft_type"),
        base=values.get("base_model_name_or_path"),
        base_revision=values.get("revision"),
        base_digest=next((digest for digest in recorded if digest), None),
        task=values.get("task_type"),
        ranks=ranks,
        alpha=values.get("lora_alpha"),
        options={k: v for k, v in sorted(values.items()) if k.startswith("use_") and v}
        | {k: values[k] for k in ("rank_pattern", "alpha_pattern") if values.get(k)},
        target_modules=values.get("target_modules"),
        modules_to_save=values.get("modules_to_save") or _heads(values, tensors),
        layers=sum(ranks.values()) or _layers(values.get("peft_type"), tensors),
        weights=weights,
        virtual_tokens=values.get("num_virtual_tokens"),
    )


def _typed(values: Mapping[str, Any], types: Mapping[str, Any], where: str, problems: list[Problem]) -> dict[str, Any]:
    """Return the values without those of a wrong type, each of which is a problem."""
    typed = dict(values)
    for key, declared in types.items():
        value = values.get(key)
        if value is None or matches_type(value, declared):
            continue
        del typed[key]
        problems.append(
            Problem("config", f"{where}: {key} cannot be {json.dumps(value)[:60]}.", "Copy the file again, or mend it.")
        )
    return typed


def _check_config(values: Mapping[str, Any], source: Source, problems: list[Problem]) -> None:
    try:
        PeftConfig.from_dict(values, where=f"{source.origin}/{ADAPTER_CONFIG}")
    except UnknownMethodError as error:
        problems.append(problem_of("unknown-method", error))
    except ConfigError as error:
        problems.append(problem_of("config", error))


def _layers(method: str | None, tensors: Iterable[TensorInfo]) -> int:
    """Return how many layers have tensors of a method."""
    if method is None:
        return 0
    head = _tensor_head(method)
    names = (info.name for info in tensors if info.name.startswith(PREFIX))
    return len({name.partition(head)[0] for name in names if head in name})


def _tensor_head(method: str) -> str:
    """Return how the names of a method's tensors begin behind their module's; an unknown method's as its own name."""
    try:
        return f".{config_class(method, method).tensor_head}_"
    except UnknownMethodError:
        return f".{method.lower()}_"


def _heads(values: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> list[str] | None:
    """Return the heads of its task that an adapter brings whole and does not name, as peft's did up to 0.10."""
    head_of_method = _tensor_head(str(values.get("peft_type")))
    words = {word for info in tensors if head_of_method not in info.name for word in info.name.split(".")[:-1]}
    heads = HEADS.get(str(values.get("task_type")), ())
    return [head for head in heads if any(word.endswith(head) for word in words)] or None


def _ranks(tensors: Iterable[TensorInfo]) -> dict[int, int]:
    ranks = Counter(info.shape[0] for info in tensors if _DOWN.search(info.name) and info.shape)
    return dict(sorted(ranks.items()))


# -- a model -----------------------------------------------------------------------------------------------


def _model(source: Source, problems: list[Problem], token: str | None, ask: bool, alone: bool) -> ModelFacts:
    """Return the facts of a model's folder; its weights may be missing unless it stands ``alone``."""
    values: dict[str, Any] = {}
    try:
        values = source.json(MODEL_CONFIG)
    except SourceError as error:
        problems.append(problem_of("damaged", error))
    values = _typed(values, _MODEL_TYPES, f"{source.origin}/{MODEL_CONFIG}", problems)
    weights = None
    names = (MODEL_STEM + SAFETENSORS, MODEL_STEM + INDEX, *PICKLES[MODEL_STEM])
    if alone or any(source.has(name) for name in names):
        headers = (remote_headers(source, token) if ask else None) or headers_of(source, MODEL_STEM, problems)
        weights = weights_of(headers) if headers else None
        if weights is not None and not weights.parameters:
            problems.append(empty_checkpoint(source, ", ".join(weights.files)))
    return ModelFacts(
        architecture=next(iter(values.get("architectures") or ()), None),
        model_type=values.get("model_type"),
        dtype=values.get("dtype") or values.get("torch_dtype"),
        quantization=values.get("quantization_config"),
        tied_embeddings=values.get("tie_word_embeddings"),
        weights=weights,
    )
