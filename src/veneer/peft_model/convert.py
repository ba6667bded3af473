"""Converts an adapter from any tool's format to another, by way of a plain LoRA where that is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from veneer.adapters.attach import check_finite
from veneer.adapters.merge.combining import check_rank
from veneer.checkpoints.find_base import kind_of
from veneer.checkpoints.layouts.older_layouts import in_current_layout
from veneer.errors import NonFiniteError, UsageError
from veneer.files import adapter_folders
from veneer.files.lookup_options import LookupOptions
from veneer.files.names import ADAPTER_CONFIG
from veneer.files.resolve import resolve
from veneer.files.source import Source
from veneer.formats import registry
from veneer.formats.base_facts import base_in_memory, given_base, named_base
from veneer.formats.canonical import CanonicalAdapter
from veneer.formats.components import model_of
from veneer.formats.expert_layouts import is_in_question
from veneer.formats.format import Format, ReadOptions, Step
from veneer.formats.peft import PeftFormat
from veneer.formats.peft_layout import canonical
from veneer.formats.tensor_files import check_free
from veneer.keywords import TOKEN, takes
from veneer.peft_model.adapted_model import AdaptedModel
from veneer.peft_model.conversion_report import ROUNDING, ConversionReport
from veneer.peft_model.convert_to_lora import as_lora as lora_of
from veneer.peft_model.convert_to_lora import base_metadata, errors_of
from veneer.peft_model.load import load
from veneer.peft_model.open_adapter import open_adapter

# The formats in which an adapter keeps the names that it has, whatever the base's are.
_OWN_NAMES = ("peft", "serving")
# Option that a file may need -> its values.
_CHOICES = {"experts": ("grouped", "rank-major"), "scaling": ("plain", "alpha/rank")}


@dataclass(frozen=True)
class _Converted:
    """Holds what is to be written.

    Attributes:
        adapters: component -> adapter.
        method: the method of the source.
        source: the title of its format.
        steps: what was done to get here.
        error: the relative error over all layers together.
        errors: layer -> its relative error.
    """

    adapters: Mapping[str, CanonicalAdapter]
    method: str
    source: str
    steps: tuple[Step, ...]
    error: float
    errors: dict[str, float]


@takes(renamed=TOKEN)
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "peft",
    base: str | Path | nn.Module | None = None,
    as_lora: bool = False,
    rank: float | None = None,
    experts: str | None = None,
    component: str | None = None,
    scaling: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> ConversionReport:
    """Convert an adapter from any tool's format to another: the same change of each weight, or an error.

    Args:
        source: the adapter: a folder, a file or a hub id.
        out: the folder or file to write. Nothing may be there.
        to: the format: ``"peft"``, ``"mlx"``, ``"gguf"``, ``"diffusers"``, ``"comfyui"``, ``"kohya"``, ``"lycoris"``,
            or ``"serving"`` for a PEFT folder that every server of LoRA reads rightly.
        base: the adapter's base, as a path (to a GGUF file too), a hub id or a model in memory; by default what the
            adapter names, where it is on this machine. Formats that rename modules need it.
        as_lora: make a plain LoRA of the adapter first, as :func:`convert_to_lora` does.
        rank: with ``as_lora``, the rank of the LoRA; needed where the change has no low rank of its own.
        experts: ``"grouped"`` or ``"rank-major"``, how a file lays out fused experts that does not say so itself.
        component: the part of a pipeline that is converted, such as ``"unet"``; by default all.
        scaling: ``"plain"`` or ``"alpha/rank"``, what an alpha meant to the version of MLX that trained it.
        revision: branch, tag or commit on the hub.
        subfolder: where below ``source`` to look.
        token: for the hub.
        local_files_only: use no network.

    Returns:
        A report: for each kind of step what was exact, folded, padded, or approximated, and its error.

    Raises:
        NotACheckpointError, IncompleteCheckpointError: no format of adapters is recognised. UnsupportedError: the
        format cannot hold the adapter; the hint says the way out. BaseModelError: a base is needed. UsageError: an
        option must decide, or is not valid. OutputError: ``out`` is taken or cannot be written. SourceError, BindError:
        a file is damaged or incomplete.
    """
    target = registry.target(to)
    _check_options(as_lora, rank, {"experts": experts, "scaling": scaling})
    lookup = LookupOptions(revision, subfolder, token, local_files_only)
    place = resolve(source, lookup, what="adapter")
    check_free(Path(out))
    facts = base_in_memory(base.adapters.catalog) if isinstance(base, AdaptedModel) else given_base(base, lookup)
    converted = (
        _as_lora(place, base, rank, lookup)
        if as_lora
        else _read(place, ReadOptions(base=facts, experts=experts, component=component, scaling=scaling), target)
    )
    _check_finite(converted.adapters, place.origin)
    named = next((adapter.base for adapter in converted.adapters.values() if adapter.base), None)
    steps = target.write(converted.adapters, Path(out), facts or named_base(named, place))
    return _report(converted, os.fspath(source), os.fspath(out), target.title, steps)


def _check_options(as_lora: bool, rank: float | None, choices: Mapping[str, str | None]) -> None:
    check_rank("rank", rank)
    if rank is not None and not as_lora:
        raise UsageError("A rank is given, and no LoRA is made.", hint="Give --as-lora too (as_lora=True).")
    for name, value in choices.items():
        if value not in (None, *_CHOICES[name]):
            raise UsageError(f"{name}={value!r} is no choice.", hint=f"There are: {', '.join(_CHOICES[name])}.")


def _read(source: Source, options: ReadOptions, target: Format) -> _Converted:
    """Read an adapter in its own format, as ``target`` needs it."""
    own_format = registry.recognise(source)
    if own_format is None:
        # Raises where nothing is that could be loaded; opening it does so for a model and for a set.
        kind_of(source, adapter_folders.members(source))
    if own_format is None or _is_in_peft(source, own_format):
        adapters = _in_peft(source, options, target.name in _OWN_NAMES)
    else:
        adapters = own_format.read(source, options)
    if options.component and list(adapters) == [""]:
        adapters = {options.component: adapters[""]}
    methods = {change.method for adapter in adapters.values() for change in adapter.modules.values()}
    return _Converted(adapters, ", ".join(sorted(methods)), _title(own_format), (), 0.0, {})


def _title(own_format: Format | None) -> str:
    return PeftFormat.title if own_format is None else own_format.title


def _is_in_peft(source: Source, own_format: Format) -> bool:
    """Tell whether there is one adapter of PEFT's, whose experts, if it has any, are laid out as today."""
    is_single = own_format.name == PeftFormat.name and source.has(ADAPTER_CONFIG)
    return is_single and not is_in_question(source.json(ADAPTER_CONFIG))


def _in_peft(source: Source, options: ReadOptions, keeps_names: bool) -> Mapping[str, CanonicalAdapter]:
    """Read PEFT's folder as loading does, which knows how other writers spell its keys.

    Unless the names are kept, those of an older version of transformers become the base's.
    """
    checkpoint = open_adapter(source)
    whole = options.base or named_base(checkpoint.config.base_model_name_or_path, source)
    base = model_of(whole, options.component or "")
    if not keeps_names and base is not None and base.catalog is not None:
        checkpoint = in_current_layout(checkpoint, base.catalog())
    tensors = checkpoint.read(checkpoint.tensors)
    adapter = canonical(checkpoint.config, tensors, checkpoint.metadata, base, source.origin)
    return {"": replace(adapter, notes=(*checkpoint.notes, *adapter.notes))}


def _check_finite(adapters: Mapping[str, CanonicalAdapter], origin: str) -> None:
    """Raise ``NonFiniteError`` for a factor or a scale that is no number."""
    for adapter in adapters.values():
        changes = adapter.modules.values()
        check_finite({f"{change.path}.{leaf}": t for change in changes for leaf, t in change.leaves.items()}, origin)
        scales = [change.path for change in changes if not math.isfinite(change.scale)]
        if scales:
            raise NonFiniteError(f"{origin}: the scale of {scales[0]} is no number.", hint="Mend it, or copy it again.")


def _as_lora(
    source: Source, base: str | Path | nn.Module | None, rank: float | None, lookup: LookupOptions
) -> _Converted:
    """Make a plain LoRA of an adapter."""
    model = load(
        source.root if source.file is None else source.file, base=base, local_files_only=lookup.local_files_only
    )
    adapter = model.adapters.get(model.active_adapter)
    config, tensors = lora_of(model, adapter, rank)
    error, errors = errors_of(model, adapter, config, tensors)
    lora = canonical(
        config, tensors, base_metadata(model, adapter), base_in_memory(model.adapters.catalog), source.origin
    )
    kind = "exact" if max(errors.values(), default=0.0) < ROUNDING else "approximated"
    step = Step(kind, "made a plain LoRA", tuple(errors), error)
    title = _title(registry.recognise(source))
    return _Converted({"": lora}, str(adapter.config.peft_type), title, (step,), error, errors)


def _report(converted: _Converted, source: str, out: str, to: str, steps: list[Step]) -> ConversionReport:
    changes = [change for adapter in converted.adapters.values() for change in adapter.modules.values()]
    errors = {change.path: 0.0 for change in changes} | {path: step.error for step in steps for path in step.modules}
    rounding = max((step.error for step in steps), default=0.0)
    return ConversionReport(
        source,
        converted.method,
        out,
        max((change.rank for change in changes), default=0),
        max(converted.error, rounding),
        converted.errors or errors,
        converted.source,
        to,
        (*converted.steps, *steps),
        notes=tuple(note for adapter in converted.adapters.values() for note in adapter.notes),
    )
