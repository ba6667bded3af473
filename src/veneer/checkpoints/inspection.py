"""What is at this path? Answered from configs and headers: no torch, no weights read, no network for local files.

Something broken is described, not raised: its ``problems`` say what is wrong and how to mend it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.checkpoints.inspection_facts import AdapterFacts, ModelFacts, PathFacts, Problem, Weights
from veneer.configs.base import PeftConfig, is_of_mlx
from veneer.configs.names import HEADS
from veneer.errors import ConfigError, SourceError, UnknownMethodError, VeneerError
from veneer.files import adapter_folders
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.files.base_map import look_up
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
from veneer.files.paths import exists
from veneer.files.resolve import looks_like_hub_id, resolve
from veneer.files.safetensors_header import Header, TensorInfo, read_header
from veneer.files.source import PICKLES, Source
from veneer.files.weight_files import check_shards, weight_files
from veneer.keywords import TOKEN, takes

if TYPE_CHECKING:
    from rich.console import RenderableType


# What is needed of a hub repository to know what it is; weights are read by their headers alone.
_SMALL = ("*.json",)
_Types = type | tuple[type, ...]
# What is shown of a config, by its type; a list is of names.
_ADAPTER_TYPES: Mapping[str, _Types] = {
    **dict.fromkeys(("peft_type", "base_model_name_or_path", "revision", "task_type"), str),
    "lora_alpha": (int, float),
    "num_virtual_tokens": int,
    "target_modules": (str, list),
    "modules_to_save": list,
}
_MODEL_TYPES: Mapping[str, _Types] = {
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), str),
    "architectures": list,
    "quantization_config": dict,
    "tie_word_embeddings": bool,
}
# Leaves whose first dimension is a rank, and of which an adapted layer has one; in memory they have the adapter's name.
_DOWN = re.compile(r"\.lora_(A(\.[^.]+)?\.weight|embedding_A(\.[^.]+)?)$")

# Where an adapted layer's tensors lie, and what begins a tensor's name where that is not the method's own.
_LAYER = "base_model.model."
_HEADS = {"ADALORA": "lora", "ADAPTION_PROMPT": "adaption", "LOHA": "hada"}


@dataclass(frozen=True)
class Inspection(PathFacts):
    """What is at a path; printed by rich, a panel with a row for each fact."""

    adapters: dict[str, Inspection] = field(default_factory=dict)

    def __rich__(self) -> RenderableType:
        """A panel: the facts, a line for each member of a set, then the problems."""
        from veneer.checkpoints.inspection_text import panel

        return panel(self)


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
    return _inspect(source, os.fspath(path), token, ask)


def _inspect(
    source: Source, path: str, token: str | None = None, ask: bool = False, in_set: bool = False
) -> Inspection:
    problems: list[Problem] = []
    if source.file is not None:
        return _inspect_file(source, path)
    has_adapter, has_model = source.has(ADAPTER_CONFIG), source.has(MODEL_CONFIG)
    adapter = _adapter(source, problems) if has_adapter else None
    model = _model(source, problems, token, ask, alone=not has_adapter) if has_model else None
    members = [] if in_set else _members(source, problems)
    adapters = {m.name: _inspect(m.source, m.source.origin, in_set=True) for m in members if m.source != source}
    problems += [Problem(p.code, f"{name}: {p.message}", p.hint) for name, a in adapters.items() for p in a.problems]
    if has_adapter and model is not None and model.weights is not None:
        problems.append(_both(source))
    if has_adapter or adapters:
        # An adapter beside a config without weights is an adapter: some tools copy the base's config there.
        kind = "model+adapter" if model is not None and model.weights is not None else "adapter"
    else:
        kind = "model" if has_model else "unknown"
    if kind == "unknown":
        problems.append(_unknown(source))
    return Inspection(path, kind, adapter, model, adapters, source.commit, tuple(problems))


def _members(source: Source, problems: list[Problem]) -> list[adapter_folders.Member]:
    try:
        return adapter_folders.members(source)
    except SourceError as error:
        problems.append(_problem("damaged", error))
        return []


def _inspect_file(source: Source, path: str) -> Inspection:
    """A single safetensors file: an adapter's when its keys say so."""
    assert source.file is not None
    header = read_header(source.file)
    weights = _weights([header])
    beside = source.file.name == ADAPTER_WEIGHTS and source.has(ADAPTER_CONFIG)
    if beside:
        return _inspect(Source(source.root, path), path)
    ranks = _ranks(header.tensors.values())
    if ranks or any(name.startswith("base_model.") for name in header.tensors):
        digest = header.metadata.get(BASE_DIGEST_KEY)
        facts = AdapterFacts(None, None, None, digest, None, ranks, None, {}, None, None, sum(ranks.values()), weights)
        return Inspection(path, "adapter", adapter=facts, problems=(_no_config(path),))
    facts_of_model = ModelFacts(None, None, None, None, None, weights)
    return Inspection(path, "model", model=facts_of_model)


# -- an adapter --------------------------------------------------------------------------------------------


def _adapter(source: Source, problems: list[Problem]) -> AdapterFacts:
    values: dict[str, Any] = {}
    try:
        values = source.json(ADAPTER_CONFIG)
        _check_config(values, source, problems)
    except SourceError as error:
        problems.append(_problem("damaged", error))
    # MLX-LM's weights have another name; that they are its own is told already.
    headers = [] if is_of_mlx(values) else _headers(source, ADAPTER_STEM, problems)
    weights = _weights(headers) if headers else None
    if weights is not None and not weights.parameters:
        problems.append(_empty(source))
    values = _typed(values, _ADAPTER_TYPES, f"{source.origin}/{ADAPTER_CONFIG}", problems)
    if not is_of_mlx(values):
        _check_base(values.get("base_model_name_or_path"), source, problems)
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


def _typed(
    values: Mapping[str, Any], types: Mapping[str, _Types], where: str, problems: list[Problem]
) -> dict[str, Any]:
    """The values without those of a wrong type, each of which is a problem."""
    kept = dict(values)
    for key, kinds in types.items():
        value = values.get(key)
        # To Python a bool is an int; a config's number is not meant by it, nor NaN or infinity.
        fits = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
        fits = fits and not (isinstance(value, float) and not math.isfinite(value))
        names = not isinstance(value, list) or all(isinstance(name, str) for name in value)
        if value is None or (fits and names):
            continue
        del kept[key]
        problems.append(
            Problem("config", f"{where}: {key} cannot be {json.dumps(value)[:60]}.", "Copy the file again, or mend it.")
        )
    return kept


def _check_config(values: Mapping[str, Any], source: Source, problems: list[Problem]) -> None:
    try:
        PeftConfig.from_dict(values, where=f"{source.origin}/{ADAPTER_CONFIG}")
    except UnknownMethodError as error:
        problems.append(_problem("unknown-method", error))
    except ConfigError as error:
        problems.append(_problem("mlx-lm" if is_of_mlx(values) else "config", error))


def _check_base(base: Any, source: Source, problems: list[Problem]) -> None:
    """A base that is named by a path must exist; whether a hub id does is not known here."""
    if not isinstance(base, str) or not base:
        problems.append(
            Problem(
                "base-not-named",
                f"{source.origin}/{ADAPTER_CONFIG} names no base model.",
                f"Name it when loading: veneer.load({source.origin!r}, base=...).",
            )
        )
        return
    try:
        place = look_up(base) or base
    except ConfigError as error:
        problems.append(_problem("base-map", error))
        return
    if not (looks_like_hub_id(place) or exists(Path(place)) or exists(source.root / place)):
        moved = "" if place == base else f" (the base map says {place})"
        problems.append(
            Problem(
                "base-not-found",
                f"The base model {base}{moved} does not exist here.",
                f"Name it when loading: veneer.load({source.origin!r}, base=...).",
            )
        )


def _layers(method: str | None, tensors: Iterable[TensorInfo]) -> int:
    """How many layers have tensors of a method: those whose names begin with its own."""
    if method is None:
        return 0
    head = f".{_HEADS.get(method, method.lower())}_"
    own = (info.name for info in tensors if info.name.startswith(_LAYER))
    return len({name.partition(head)[0] for name in own if head in name})


def _heads(values: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> list[str] | None:
    """The heads of its task that an adapter brings whole without saying so, as peft's were up to 0.10."""
    method = str(values.get("peft_type"))
    own = f".{_HEADS.get(method, method.lower())}_"
    words = {word for info in tensors if own not in info.name for word in info.name.split(".")[:-1]}
    heads = HEADS.get(str(values.get("task_type")), ())
    return [head for head in heads if any(word.endswith(head) for word in words)] or None


def _ranks(tensors: Iterable[TensorInfo]) -> dict[int, int]:
    found = Counter(info.shape[0] for info in tensors if _DOWN.search(info.name) and info.shape)
    return dict(sorted(found.items()))


# -- a model -----------------------------------------------------------------------------------------------


def _model(source: Source, problems: list[Problem], token: str | None, ask: bool, alone: bool) -> ModelFacts:
    values: dict[str, Any] = {}
    try:
        values = source.json(MODEL_CONFIG)
    except SourceError as error:
        problems.append(_problem("damaged", error))
    values = _typed(values, _MODEL_TYPES, f"{source.origin}/{MODEL_CONFIG}", problems)
    weights = None
    names = (MODEL_STEM + SAFETENSORS, MODEL_STEM + INDEX, *PICKLES[MODEL_STEM])
    if alone or any(source.has(name) for name in names):
        headers = (_remote_headers(source, token) if ask else None) or _headers(source, MODEL_STEM, problems)
        weights = _weights(headers) if headers else None
        if weights is not None and not weights.parameters:
            problems.append(_empty(source, ", ".join(weights.files)))
    return ModelFacts(
        architecture=next(iter(values.get("architectures") or ()), None),
        model_type=values.get("model_type"),
        dtype=values.get("dtype") or values.get("torch_dtype"),
        quantization=values.get("quantization_config"),
        tied_embeddings=values.get("tie_word_embeddings"),
        weights=weights,
    )


def _headers(source: Source, stem: str, problems: list[Problem]) -> list[Header]:
    headers: list[Header] = []
    try:
        files = weight_files(source, stem)
    except VeneerError as error:
        code = {
            "PickleRefusedError": "pickle-only",
            "IncompleteCheckpointError": "missing-shard" if source.has(stem + INDEX) else "no-weights",
        }
        problems.append(_problem(code.get(type(error).__name__, "damaged"), error))
        return []
    for file in files:
        try:
            headers.append(read_header(file))
        except SourceError as error:
            problems.append(_problem("damaged", error))
    if len(headers) == len(files):
        try:
            check_shards(source, stem, headers)
        except SourceError as error:
            problems.append(_problem("shards", error))
    return headers


def _remote_headers(source: Source, token: str | None) -> list[Header] | None:
    """Headers read from the hub, for a model whose weights are not in the cache."""
    if any(source.root.glob(f"*{SAFETENSORS}")):
        return None
    from huggingface_hub import HfApi

    try:
        found = HfApi(token=token).get_safetensors_metadata(source.origin, revision=source.commit)
    except Exception:  # whatever keeps the hub from answering: the local problem is then reported instead
        return None
    return [
        Header(
            Path(name),
            {n: TensorInfo(n, t.dtype, tuple(t.shape), *t.data_offsets) for n, t in file.tensors.items()},
            file.metadata,
        )
        for name, file in found.files_metadata.items()
    ]


def _weights(headers: list[Header]) -> Weights:
    tensors = [info for header in headers for info in header.tensors.values()]
    dtypes: Counter[str] = Counter()
    for info in tensors:
        dtypes[info.dtype] += info.numel
    return Weights(
        files=[header.path.name for header in headers],
        tensors=len(tensors),
        parameters=sum(dtypes.values()),
        nbytes=sum(info.nbytes for info in tensors),
        dtypes=dict(sorted(dtypes.items())),
    )


# -- problems ----------------------------------------------------------------------------------------------


def _problem(code: str, error: VeneerError) -> Problem:
    return Problem(code, error.message, error.hint or "")


def _empty(source: Source, file: str = ADAPTER_WEIGHTS) -> Problem:
    return Problem(
        "empty-checkpoint",
        f"{source.origin}: empty checkpoint: {file} holds no values.",
        "ZeRO-3 and FSDP save this when weights are not gathered first; gather them and save again.",
    )


def _both(source: Source) -> Problem:
    return Problem(
        "model-and-adapter",
        f"{source.origin} holds a full model and an adapter; the adapter's config decides when it is loaded.",
        "If the adapter was merged into the model, move its adapter_* files away.",
    )


def _no_config(path: str) -> Problem:
    return Problem(
        "no-config",
        f"{path}: an adapter's weights without {ADAPTER_CONFIG}: its scale and base are unknown.",
        "Copy the config from where the adapter was trained.",
    )


def _unknown(source: Source) -> Problem:
    names = source.files()
    if not names and not any(source.root.iterdir()):
        return Problem("empty-folder", f"{source.origin} is an empty folder.", "Check the path.")
    if any(name in names for name in (ADAPTER_WEIGHTS, *PICKLES[ADAPTER_STEM])):
        return _no_config(source.origin)
    if any(name.endswith(SAFETENSORS) for name in names):
        return Problem(
            "no-config",
            f"{source.origin}: weights without {MODEL_CONFIG}: the model's class is unknown.",
            "Copy the config from where the model came from.",
        )
    inner = _inner(source)
    states = [name for name in inner if adapter_folders.TRAINER_CHECKPOINT.fullmatch(name)]
    if inner:
        what = "a trainer's checkpoints" if states else "checkpoints in its folders"
        return Problem(
            "trainer-output" if states else "in-subfolder",
            f"{source.origin} holds {what}: {', '.join(states or inner)}.",
            f"Choose one, such as {source.origin}/{(states or inner)[-1]}.",
        )
    return Problem(
        "no-checkpoint",
        f"{source.origin} holds neither {MODEL_CONFIG} nor {ADAPTER_CONFIG}.",
        "Check the path" + (f"; it holds {', '.join(names[:5])}." if names else "."),
    )


def _inner(source: Source) -> list[str]:
    """The folders below that hold a checkpoint, a trainer's in the order of their steps."""
    found = {p.parent.name for name in (MODEL_CONFIG, ADAPTER_CONFIG) for p in source.root.glob(f"[!.]*/{name}")}
    return sorted(found, key=_steps)


def _steps(name: str) -> list[tuple[int, str]]:
    """Orders ``checkpoint-500`` before ``checkpoint-1000``."""
    return [(len(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
