"""Converts an adapter of any method to a plain LoRA, which any tool loads, and reports the error of that.

A change that is low-rank by definition is taken over as it is, and its error is rounding. Any other change ``D``
becomes the nearest matrix of rank ``r``, by its singular values (Eckart and Young 1936); the error is
``||D - B A|| / ||D||`` in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.merge.combining import Combination, check_rank, combine
from veneer.adapters.merge.in_memory import check_mergeable
from veneer.checkpoints.checkpoint import write_checkpoint
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import AdapterError, NoAdaptersError, NotConvertibleError, UnsupportedError
from veneer.files.adapter_folders import DEFAULT
from veneer.files.base_digest import BASE_DIGEST_KEY
from veneer.files.output_folder import check_output
from veneer.files.tensor_keys import encode
from veneer.keywords import takes, unknown_keywords
from veneer.layers.adapter_shares import LayerAdapters
from veneer.layers.weight_change import change_of
from veneer.methods.lora import METHOD as LORA
from veneer.peft_model.adapted_model import AdaptedModel, adapted_model
from veneer.peft_model.conversion_report import ConversionReport
from veneer.peft_model.load import load
from veneer.printing import progress, warn

_NOTHING = "Could not detect any layer that supports LoRA conversion"


@overload
def convert_to_lora(
    source: nn.Module | str | Path,
    rank: float | None = None,
    adapter_name: str | None = None,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
    *,
    out: None = None,
    base: str | Path | None = None,
    **load_options: Any,
) -> tuple[LoraConfig, dict[str, Tensor]]: ...
@overload
def convert_to_lora(
    source: nn.Module | str | Path,
    rank: float | None = None,
    adapter_name: str | None = None,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    base: str | Path | None = None,
    **load_options: Any,
) -> ConversionReport: ...
@takes(renamed={"model": "source"}, others=True)
def convert_to_lora(
    source: nn.Module | str | Path,
    rank: float | None = None,
    adapter_name: str | None = None,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
    **load_options: Any,
) -> ConversionReport | tuple[LoraConfig, dict[str, Tensor]]:
    """Make a plain LoRA adapter of any other, and write it in float32 or, as peft does, return it in its own dtype.

    Modules that the adapter brings whole (``modules_to_save``) go along.

    Args:
        source: a model with adapters, or an adapter's folder or hub id.
        rank: the rank of the LoRA; needed where a change has no low rank by definition, and an upper bound otherwise.
            A float up to 1.0 is the share of each layer's change, as a sum of squares, for which the layer gets the
            smallest rank that holds it.
        adapter_name: the adapter of a model; when ``None`` the one called ``default``, or without it the active one.
        progressbar: show progress on the terminal.
        compile_kwargs: accepted for peft's sake; nothing is compiled.
        out: the folder to write. It must not exist or be empty. ``None`` writes nothing.
        base: the base of an adapter that is given by its path; by default what its config names.
        **load_options: as for :func:`veneer.load`.

    Returns:
        A report of what was written to ``out``; without that, the LoRA's config, and its tensors by checkpoint key.

    Raises:
        UnknownKeywordError: an option is none of :func:`veneer.load`, or ``source`` is in memory and takes none.
        OutputError: ``out`` is taken or cannot be written. AdapterError: ``source`` has no single active adapter.
        MergeError: the adapter's change depends on the input, so that no weights hold it.
        UnsupportedError: no LoRA can hold the adapter, or ``rank`` is missing. Whatever loading raises.
    """
    idle = [*load_options, *(() if base is None else ("base",))]
    if isinstance(source, nn.Module) and idle:
        raise unknown_keywords("convert_to_lora() of a model in memory", idle, ("out", "rank", "adapter_name"))
    check_rank("rank", rank)
    if out is not None:
        check_output(Path(out))
    model = _adapted_model(source) if isinstance(source, nn.Module) else load(source, base=base, **load_options)
    adapter = model.adapters.get(_name(model, adapter_name))
    with progress("Converting to LoRA", progressbar):
        config, tensors = as_lora(model, adapter, rank)
        if out is None:
            if isinstance(adapter.config, LoraConfig):
                warn("Converting a PEFT adapter to LoRA that is already a LoRA adapter.")
            return config, _in_dtype_of(adapter, tensors)
        return _written(model, adapter, config, tensors, Path(out))


@takes()
def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter of a model as a plain LoRA: :func:`convert_to_lora` by peft's name for that.

    Args:
        path: the folder to write. It must not exist or be empty.
        model: the model.
        rank: as for :func:`convert_to_lora`.
        adapter_name: the adapter.
        progressbar: show progress on the terminal.
        compile_kwargs: accepted for peft's sake.

    Raises:
        OutputError: ``path`` is taken or cannot be written. UnsupportedError: no LoRA can hold the adapter.
    """
    convert_to_lora(model, rank, adapter_name, progressbar, out=path)


def _adapted_model(model: nn.Module) -> AdaptedModel:
    try:
        return adapted_model(model)
    except NoAdaptersError as error:
        raise NoAdaptersError(f"{_NOTHING}: {error.message}", hint=error.hint) from None


def as_lora(model: AdaptedModel, adapter: Adapter, rank: float | None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the config and tensors (checkpoint key -> float32 tensor) of an adapter as a LoRA."""
    if not adapter.layers.by_id:
        kind = "a prompt" if adapter.prompt else "of whole modules"
        raise NotConvertibleError(
            f"{_NOTHING}: {adapter.name!r} ({adapter.config.peft_type}) is {kind}.",
            hint="Convert an adapter of layers, such as LoKr.",
        )
    check_mergeable(model.adapters, [adapter.name])
    _check_layers(list(adapter.layers), adapter.name, rank)
    combination = Combination((adapter.name,), (1.0,), "cat" if rank is None else "svd", rank)
    config, tensors = combine(model.adapters, combination)
    return replace(config, base_model_name_or_path=adapter.config.base_model_name_or_path), tensors


def _in_dtype_of(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in an adapter's dtype, where it has one."""
    dtype, *others = adapter.dtypes()
    return dict(tensors) if others else {key: tensor.to(dtype) for key, tensor in tensors.items()}


def errors_of(
    model: AdaptedModel, adapter: Adapter, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[float, dict[str, float]]:
    """Return the relative error of a LoRA that stands for an adapter: over all layers together, and of each layer."""
    norms = {layer.site.id: _norms(layer, adapter.name, config, tensors) for layer in adapter.layers}
    total = sum(size for _, size in norms.values())
    error = (sum(rest for rest, _ in norms.values()) / total) ** 0.5 if total else 0.0
    return error, {name: (rest / size) ** 0.5 if size else 0.0 for name, (rest, size) in norms.items()}


def base_metadata(model: AdaptedModel, adapter: Adapter) -> dict[str, str]:
    """Return the metadata that record an adapter's base."""
    digest = adapter.base_digest or model.base_digest
    return {} if digest is None else {BASE_DIGEST_KEY: digest}


def _written(
    model: AdaptedModel, adapter: Adapter, config: LoraConfig, tensors: Mapping[str, Tensor], target: Path
) -> ConversionReport:
    error, errors = errors_of(model, adapter, config, tensors)
    write_checkpoint(target, config, tensors, base_metadata(model, adapter))
    rank = max(config.rank_pattern.values(), default=config.r)
    name = str(adapter.origin or adapter.name)
    return ConversionReport(name, str(adapter.config.peft_type), str(target), rank, error, errors)


def _name(model: AdaptedModel, adapter_name: str | None) -> str:
    if adapter_name is not None:
        return adapter_name
    active = [DEFAULT] if DEFAULT in model.adapters.by_name else list(model.active_adapters)
    if len(active) != 1:
        raise AdapterError(
            f"{len(active)} adapters are active, and one is converted.",
            hint="Name it with adapter_name=..., or combine several with add_weighted_adapter.",
        )
    return active[0]


@torch.no_grad()
def _check_layers(layers: Sequence[LayerAdapters], adapter: str, rank: float | None) -> None:
    """Raise ``UnsupportedError`` where no LoRA can be, or when a change has no low rank and none is given."""
    for layer in layers:
        layer.site.check_low_rank()
        if rank is None and not all(patch.only_adds for patch in layer.patches([adapter])):
            raise UnsupportedError(
                f"{layer.site.name}: the adapter's change has no low rank of its own, so that one must be chosen.",
                hint="Give rank=... (--rank), such as 16; the report tells what it leaves.",
            )


@torch.no_grad()
def _norms(
    layer: LayerAdapters, adapter: str, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Return the squared norms of the difference between a layer's change and the LoRA's, and of that change."""
    key = encode(layer.site.key, "")
    by_leaf = {name[len(key) :]: tensor for name, tensor in tensors.items() if name.startswith(key)}
    leaves = {leaf: tensor.to(layer.base_stored.device) for leaf, tensor in by_leaf.items() if leaf in LORA.by_name}
    patch = LORA.lower(LORA.settings(config, layer.site), leaves, layer)
    assert patch.up is not None
    assert patch.down is not None
    change = change_of(layer, layer.weight_patches([adapter])).whole()
    rest = change - patch.scale * (patch.up @ patch.down)
    return float(rest.double().square().sum()), float(change.double().square().sum())
