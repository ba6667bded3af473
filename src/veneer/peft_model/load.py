"""One loader for any path: adapter, full model, both in one folder, or a set of adapters.

source -> what is it? -> config -> base -> base model -> attach -> report
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.base_model.transformers_errors import ANOTHER_CLASS, transformers_errors_as
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.checkpoints.find_base import find_base, gguf_base, kind_of
from veneer.checkpoints.model_class import class_for, dtype_of, labels_of, note_of
from veneer.checkpoints.resized_vocabulary import required_vocabulary
from veneer.checkpoints.torch_dtypes import DTYPES
from veneer.configs.base import PeftConfig
from veneer.configs.names import TaskType
from veneer.errors import BaseModelError, SourceError
from veneer.files import adapter_folders
from veneer.files.base_folder import origin_of, without_adapter
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import MODEL_CONFIG, MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX
from veneer.files.weight_files import read_headers
from veneer.keywords import DTYPE, TOKEN, keywords, takes, unknown
from veneer.packages import GGUF_PACKAGES, require
from veneer.peft_model.attach_adapter import AttachOptions, attach_all, set_mode
from veneer.peft_model.load_report import LoadReport
from veneer.peft_model.open_adapter import OpenedAdapters, open_adapters
from veneer.peft_model.peft_model import PeftModel, wrap


@takes(renamed={**DTYPE, **TOKEN}, others=True)
def load(
    path: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    task: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    merge: bool = False,
    into: str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    subfolder: str | None = None,
    strict: bool = True,
    strict_base: bool = False,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    config: Any = None,
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    **model_kwargs: Any,
) -> PeftModel:
    """Load whatever is at ``path`` as one model object with every feature.

    Args:
        path: a local folder or hub id: an adapter, a full or merged model, a set of adapters, or both in one
            (the adapter's config then decides).
        base: the base model, as a path, a hub id or a model in memory. By default what the adapter's config
            names: as a path relative to the adapter's folder, as a path, as a hub id.
        task: what the model is for, such as ``"CAUSAL_LM"``; by default the adapter's task, then the base's class.
        dtype: of the base model; ``"auto"`` keeps that of its files. An adapter keeps its own. ``torch_dtype`` is
            another name of it.
        device_map: where the base goes, as in transformers (needs accelerate).
        merge: put the adapter into the base weights for good.
        into: with ``merge``, required where the base is quantised: ``"dequantized"`` or ``"requantized"``.
        adapter_name: the adapter's name on the model; the adapters of a set keep their own.
        is_trainable: whether the adapter is loaded to be trained further.
        revision: of ``path`` on the hub.
        base_revision: of the base on the hub; by default what the adapter's config names.
        subfolder: where in ``path`` to look.
        strict: raise when adapter and base do not fit; else use what fits and warn.
        strict_base: raise when the base is not the one that the adapter records; else warn.
        trust_remote_code: run code that comes with the base model; an adapter's is never run.
        local_files_only: never use the network.
        token: for the hub.
        cache_dir: the hub's cache; huggingface_hub's own when ``None``.
        force_download: ask the hub again for what the cache holds.
        config: an adapter's config, used in place of its own; or one of transformers for the base.
        autocast_adapter_dtype: as for :meth:`PeftModel.load_adapter`.
        key_mapping: as for :meth:`PeftModel.load_adapter`; for the base's weights too, as in transformers.
        **model_kwargs: passed on to transformers when it builds the base: ``quantization_config``, ``max_memory``,
            ``offload_folder``, ``tp_plan``; ``gguf_file`` names a GGUF file in the base's folder.

    Returns:
        The model; its ``load_report`` says what was found, bound and made active.

    Raises:
        SourceError, ConfigError: ``path`` cannot be read. BaseModelError: no usable base. BindError: they do not
        fit. UnknownKeywordError: transformers does not take one of ``model_kwargs``, or ``base`` is in memory already.
    """
    started = time.perf_counter()
    lookup = LookupOptions(revision, subfolder, token, local_files_only, cache_dir, force_download, base_revision)
    adapter_config = config if isinstance(config, PeftConfig) else None
    if config is not adapter_config:
        model_kwargs["config"] = config
    source = resolve(path, lookup)
    members = adapter_folders.members(source)
    report = LoadReport(path=str(path), kind=kind_of(source, members))
    if isinstance(base, PeftModel):
        raise BaseModelError(
            "base= is a PeftModel; its adapters would be stacked.",
            hint="Use its load_adapter(...), or pass what its get_base_model() or unload() returns.",
        )
    opened = OpenedAdapters()
    if report.kind != "model":
        opened = open_adapters(source, members, adapter_name, strict, adapter_config)
    checkpoints = opened.checkpoints
    own: frozenset[torch.dtype] = frozenset()
    if isinstance(base, nn.Module):
        _check_nothing_is_built(model_kwargs, dtype, device_map, base_revision)
        model, report.base = _in_memory(base, checkpoints, source, task)
    else:
        if key_mapping:
            model_kwargs["key_mapping"] = key_mapping
        gguf = model_kwargs.get("gguf_file")
        if gguf is not None and checkpoints and base is not None:
            found = gguf_base(base, gguf, lookup.for_base(checkpoints[0].config.revision))
        else:
            found = find_base(source, checkpoints, base, lookup)
        report.base = f"{found.source.origin}, {found.why}"
        own = _converted(found.source) if merge else own
        model = _build(found.source, checkpoints, task, report, dtype, device_map, trust_remote_code, model_kwargs)
    report.seconds["base"] = time.perf_counter() - started
    model.load_log.report = report
    how = AttachOptions(is_trainable, strict, strict_base, autocast_adapter_dtype, key_mapping)
    with model.adapters.merging_on_load(own) if merge else contextlib.nullcontext():
        attach_all(model, opened, how)
        report.seconds["adapters"] = time.perf_counter() - started - report.seconds["base"]
        if merge and model.adapters.by_name:
            model.merge_and_unload(into=into)
            report.merged = True
    set_mode(model, is_trainable)
    model.load_log.finish(started)
    return model


def _converted(base: Source) -> frozenset[torch.dtype]:
    """The dtypes in which weights in memory are copies of those in a base's files, and not the mapped files themselves.

    Writing to a mapped page costs more than new memory, and the page that is given up costs nothing.
    """
    try:
        headers = read_headers(base, MODEL_STEM)
    except SourceError:  # other files than safetensors
        return frozenset()
    stored = {DTYPES.get(info.dtype) for header in headers for info in header.tensors.values()}
    return frozenset({torch.float32, torch.bfloat16, torch.float16} - stored)


def _check_nothing_is_built(
    model_kwargs: Mapping[str, Any], dtype: Any, device_map: Any, base_revision: str | None
) -> None:
    """Raise ``UnknownKeywordError`` for what would say how a base is built, which one in memory is already."""
    given = {"dtype": dtype == "auto", "device_map": device_map is None, "base_revision": base_revision is None}
    idle = [*model_kwargs, *(name for name, is_default in given.items() if not is_default)]
    if idle:
        raise unknown("load() with a base in memory", idle, [name for name in keywords(load) if name not in given])


def _in_memory(
    base: nn.Module, checkpoints: list[Checkpoint], source: Source, task: str | None
) -> tuple[PeftModel, str]:
    if not checkpoints:
        raise BaseModelError(
            f"{source.origin} is a full model; it takes no base.",
            hint="Leave base= out, or give an adapter's path.",
        )
    return wrap(base, task or checkpoints[0].config.task_type), f"the {type(base).__name__} given as base="


def _gguf_config(source: Source, file: str) -> dict[str, Any]:
    """What a GGUF file's metadata says of the model, as a config."""
    require("A base in a GGUF file", *GGUF_PACKAGES, extra="demo", error=BaseModelError)
    import transformers

    what = f"transformers cannot read {source.origin}/{file}"
    auto: Any = transformers.AutoConfig
    with transformers_errors_as(BaseModelError, what, "It needs an architecture that transformers reads from GGUF."):
        return dict(
            auto.from_pretrained(source.root, gguf_file=file, local_files_only=True, trust_remote_code=False).to_dict()
        )


# -- building it -------------------------------------------------------------------------------------------


def _build(
    source: Source,
    checkpoints: list[Checkpoint],
    task: str | None,
    report: LoadReport,
    dtype: Any,
    device_map: Any,
    trust_remote_code: bool,
    model_kwargs: dict[str, Any],
) -> PeftModel:
    gguf = model_kwargs.get("gguf_file")
    config = source.json(MODEL_CONFIG) if gguf is None else _gguf_config(source, gguf)
    wanted = task or next((c.config.task_type for c in checkpoints if c.config.task_type), None)
    kind = class_for(source, config, checkpoints, task, trust_remote_code)
    report.warnings += note_of(kind, config, checkpoints, task)
    arguments = {
        "dtype": dtype_of(dtype),
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
        **model_kwargs,
    }
    if device_map is not None:
        require("device_map=", "accelerate", extra="device-map", error=BaseModelError)
        arguments["device_map"] = device_map
    if gguf is not None:
        import transformers

        # Left packed it would need kernels that few machines have, and could not be merged.
        if hasattr(transformers, "GgufConfig"):
            arguments.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    vocabulary = (
        required_vocabulary(checkpoints, source, config, str(wanted) if wanted else None) if gguf is None else None
    )
    labels = labels_of(checkpoints)
    if labels is not None and "num_labels" not in arguments:
        arguments["num_labels"] = labels
        arguments.setdefault("ignore_mismatched_sizes", True)
    what = f"transformers cannot load {source.origin} as {kind.__name__}"
    with (
        without_adapter(source) as folder,
        transformers_errors_as(BaseModelError, what, ANOTHER_CLASS),
        _taken(model_kwargs),
    ):
        model, info = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    model.name_or_path = model.config._name_or_path = origin_of(source)
    model.eval()
    if vocabulary is not None:
        before = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        report.warnings.append(
            f"The base's vocabulary was resized from {before} to {vocabulary} tokens, as the adapter's."
        )
    brought = {k.removeprefix(PREFIX).removeprefix(SHARED_PREFIX) for c in checkpoints for k in c.tensors}
    fresh = sorted(set(info["missing_keys"]) - brought)
    if fresh:
        report.warnings.append(
            f"{len(fresh)} weights of {kind.__name__} are not in the base and start random: {', '.join(fresh[:3])}."
        )
    return wrap(model, wanted if wanted in set(TaskType) else None)


@contextlib.contextmanager
def _taken(model_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Tell of a keyword that a model's class does not take as one that :func:`load` does not take."""
    try:
        yield
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in model_kwargs:
            raise
        raise unknown("load()", [refused[1]], keywords(load)) from error
