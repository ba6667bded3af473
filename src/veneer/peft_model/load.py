"""Loads any path: an adapter, a full model, both in one folder, or a set of adapters.

path -> source -> checkpoints -> base -> base model -> attached adapters -> report
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.checkpoints.find_base import find_base, kind_of
from veneer.checkpoints.model_class import wanted_task
from veneer.configs.base import PeftConfig
from veneer.errors import BaseModelError
from veneer.files import adapter_folders
from veneer.files.lookup_options import LookupOptions
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.formats.base_facts import given_base
from veneer.keywords import DTYPE, TOKEN, keywords, takes, unknown_keywords
from veneer.peft_model.attach_adapter import AttachOptions, attach_all, set_mode
from veneer.peft_model.build_base import BuildOptions, build_base, copied_dtypes
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
        task: the task of the model, such as ``"CAUSAL_LM"``; by default the adapter's task, then the base's class.
        dtype: of the base model; ``"auto"`` keeps that of its files. An adapter keeps its own. ``torch_dtype`` is
            another name of it.
        device_map: the devices that the base goes to, as in transformers (needs accelerate).
        merge: put the adapter into the base weights for good.
        into: with ``merge``, required where the base is quantised: ``"dequantized"`` or ``"requantized"``.
        adapter_name: the adapter's name on the model; the adapters of a set keep their own.
        is_trainable: load the adapter to train it further.
        revision: of ``path`` on the hub.
        base_revision: of the base on the hub; by default what the adapter's config names.
        subfolder: the folder below ``path``.
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
        The model; its ``load_report`` tells what was found, bound and made active.

    Raises:
        SourceError, ConfigError: ``path`` cannot be read. BaseModelError: no usable base. BindError: they do not
        fit. UnknownKeywordError: transformers does not take one of ``model_kwargs``, or ``base`` is in memory already.
    """
    started = time.perf_counter()
    lookup = LookupOptions(revision, subfolder, token, local_files_only, cache_dir, force_download, base_revision)
    adapter_config = config if isinstance(config, PeftConfig) else None
    if config is not adapter_config:
        model_kwargs["config"] = config
    if key_mapping and not isinstance(base, nn.Module):
        model_kwargs["key_mapping"] = key_mapping
    building = BuildOptions(task, dtype, device_map, trust_remote_code, model_kwargs)
    source = resolve(path, lookup)
    members = adapter_folders.members(source)
    report = LoadReport(path=str(path), kind=kind_of(source, members))
    if isinstance(base, nn.Module):
        _check_in_memory(base, source, report.kind, building, base_revision)
    opened = OpenedAdapters()
    if report.kind != "model":
        facts = partial(given_base, base, lookup, building.gguf_file)
        opened = open_adapters(source, members, adapter_name, strict, adapter_config, facts)
    checkpoints, copied = opened.checkpoints, frozenset[torch.dtype]()
    if isinstance(base, nn.Module):
        built, report.base = base, f"the {type(base).__name__} given as base="
    else:
        found_base = find_base(source, checkpoints, base, lookup, building.gguf_file)
        report.base = f"{found_base.source.origin}, {found_base.why}"
        copied = copied_dtypes(found_base.source) if merge else copied
        with _refusing_keywords(model_kwargs):
            built, report.warnings = build_base(found_base.source, checkpoints, building)
    model = wrap(built, wanted_task(task, checkpoints))
    report.seconds["base"] = time.perf_counter() - started
    model.load_log.report = report
    attaching = AttachOptions(
        trainable=is_trainable,
        strict=strict,
        strict_base=strict_base,
        autocast_adapter_dtype=autocast_adapter_dtype,
        key_mapping=key_mapping,
    )
    with model.adapters.merging_on_load(copied) if merge else contextlib.nullcontext():
        attach_all(model, opened, attaching)
        report.seconds["adapters"] = time.perf_counter() - started - report.seconds["base"]
        if merge and model.adapters.by_name:
            model.merge_and_unload(into=into)
            report.merged = True
    set_mode(model, is_trainable)
    model.load_log.finish(started)
    return model


def _check_in_memory(
    base: nn.Module, source: Source, kind: str, building: BuildOptions, base_revision: str | None
) -> None:
    """Check that a base in memory is a plain model, that there is an adapter for it, and that nothing is to be built.

    Raises:
        BaseModelError: it is a PeftModel, or no base is needed. UnknownKeywordError: a keyword says how to build it.
    """
    if isinstance(base, PeftModel):
        raise BaseModelError(
            "base= is a PeftModel; its adapters would be stacked.",
            hint="Use its load_adapter(...), or pass what its get_base_model() or unload() returns.",
        )
    given = {
        "dtype": building.dtype != "auto",
        "device_map": building.device_map is not None,
        "base_revision": base_revision is not None,
    }
    idle = [*building.model_kwargs, *(name for name, is_given in given.items() if is_given)]
    if idle:
        known = [name for name in keywords(load) if name not in given]
        raise unknown_keywords("load() with a base in memory", idle, known)
    if kind == "model":
        raise BaseModelError(
            f"{source.origin} is a full model; it takes no base.", hint="Leave base= out, or give an adapter's path."
        )


@contextlib.contextmanager
def _refusing_keywords(model_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Raise ``UnknownKeywordError`` for a keyword that a model's class does not take."""
    try:
        yield
    except BaseModelError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error.__cause__))
        if refused is None or refused[1] not in model_kwargs:
            raise
        raise unknown_keywords("load()", [refused[1]], keywords(load)) from error
