"""Puts another adapter's weights in the place of one on a model, without compiling the model anew.

A compiled graph keeps the tensors that it was made with, and their shapes, so the new values are copied into them. For
adapters of different ranks and scales the model is prepared once, before it is compiled: each LoRA is padded with zeros
to the largest rank, and its scale becomes a tensor too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import check_finite
from veneer.checkpoints.binding_plan import Binding, Plan, bind_error, make_plan
from veneer.checkpoints.checkpoint import Checkpoint, in_memory_checkpoint
from veneer.checkpoints.layouts.older_layouts import in_current_layout
from veneer.checkpoints.open_checkpoint import open_checkpoint
from veneer.configs.base import PeftConfig, targeted
from veneer.configs.lora_start_options import is_moved
from veneer.configs.methods.lora import LoraConfig
from veneer.errors import AdapterError, MergeError, UnsupportedError, UsageError
from veneer.files.tensor_keys import PREFIX
from veneer.formats.base_facts import base_in_memory
from veneer.keywords import IGNORED, SOURCE, TOKEN, takes
from veneer.layers.adapter_shares import BoundAdapter, LayerAdapters
from veneer.methods import method_of
from veneer.methods.base.abilities import settings_by_tensors
from veneer.methods.base.trained_bias import Bias, base_bias
from veneer.methods.lora import RANK_DIMS, Lora, LoraSettings
from veneer.peft_model.adapted_model import AdaptedModel, adapted_model, injected_in
from veneer.peft_model.attach_adapter import note_swapped
from veneer.peft_model.open_adapter import find_adapter
from veneer.printing import warn


@torch.no_grad()
@takes()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Prepare every LoRA on ``model`` for the weights of others, of any rank up to ``target_rank``.

    Call it before the model is compiled. The adapters compute the same as before, can be trained if they could be, and
    are saved without what is added.

    Args:
        model: the model, with its adapters.
        target_rank: the largest rank of the adapters to come; the ranks stay as they are when ``None``.
        config: configs, or one, that are given ``target_rank`` as their rank. One of an adapter on the model shows it,
            and is saved with the rank that the adapter has.
        check_compiled: where the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        UnsupportedError: an adapter is of another method, or its rank cannot be padded.
        AdapterError: ``target_rank`` is smaller than a rank that is there, or the model is compiled.
        BaseModelError: the model has no adapters.
    """
    _check_not_compiled(model, check_compiled)
    adapted = adapted_model(model)
    with adapted.adapters.changing():
        _prepare(adapted, target_rank)
    _set_ranks(adapted, [config] if isinstance(config, LoraConfig) else list((config or {}).values()), target_rank)


def _check_not_compiled(model: nn.Module, check: str) -> None:
    if check not in ("error", "warn", "ignore"):
        raise UsageError(f"check_compiled={check!r} is none of the choices.", hint='"error", "warn" or "ignore".')
    if check == "ignore" or not (hasattr(model, "_orig_mod") or model._compiled_call_impl is not None):
        return
    message = (
        "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be compiled anew."
    )
    if check == "error":
        raise AdapterError(
            message,
            hint="Call prepare_model_for_compiled_hotswap *before* compiling the model, or pass "
            'check_compiled="ignore".',
        )
    warn(message)


def _set_ranks(model: AdaptedModel, configs: Sequence[LoraConfig], rank: int | None) -> None:
    if rank is None:
        return
    for entry in model.adapters.by_name.values():
        if any(entry.config is config for config in configs) and entry.saved_config is None:
            entry.saved_config = copy.deepcopy(entry.config)
    for config in configs:
        config.r, config.rank_pattern = rank, dict.fromkeys(config.rank_pattern, rank)


def _prepare(model: AdaptedModel, target_rank: int | None) -> None:
    shares = [
        (entry, layer, share) for entry in model.adapters.by_name.values() for layer, share in entry.bound_layers()
    ]
    for entry, layer, share in shares:
        _check_can_be_padded(entry, layer, share, target_rank)
    for entry, layer, share in shares:
        settings = share.settings
        for leaf, parameter in layer.tensors(entry.name, share).items():
            _pad(parameter, RANK_DIMS.get(leaf), target_rank, layer.site.groups)
        scale = torch.tensor(float(settings.scale), device=layer.base_stored.device)
        padded = target_rank is not None and layer.site.stack is None
        layer.reset(entry.name, share, replace(settings, scale=scale, padded=padded))
        entry.swappable = True


def _check_can_be_padded(entry: Adapter, layer: LayerAdapters, share: BoundAdapter, rank: int | None) -> None:
    if not isinstance(share.method, Lora) or share.settings.variant is not None:
        raise UnsupportedError(
            f"{entry.name!r} holds more than a LoRA at {layer.site.name}; only LoRA can be prepared for hot-swapping.",
            hint="hotswap_adapter takes it unprepared, for adapters of the same shapes and scale.",
        )
    own_rank = share.settings.r
    if rank is not None and own_rank != rank and layer.site.stack is not None:
        raise UnsupportedError(
            f"{layer.site.id}: the rank of a LoRA on stacked experts cannot be padded.",
            hint="Swap adapters of one rank there (leave target_rank out).",
        )
    if rank is not None and rank % layer.site.groups:
        raise UnsupportedError(
            f"{layer.site.name} has {layer.site.groups} groups, and target_rank={rank} is no multiple of that.",
            hint="Give a target_rank that is one.",
        )
    if rank is not None and own_rank > rank:
        raise AdapterError(
            f"target_rank={rank} is smaller than the rank {own_rank} of {entry.name!r} at {layer.site.name}.",
            hint="Give the largest rank of all adapters that will be swapped in.",
        )


def _pad(parameter: nn.Parameter, dim: int | None, rank: int | None, groups: int) -> None:
    """Pad a parameter with zeros up to ``rank`` along ``dim``, in memory of its own."""
    shape = list(parameter.shape)
    if dim is not None and rank is not None:
        shape[dim] = rank if dim == 0 else rank // groups
    padded = parameter.new_zeros(shape)
    _fill(padded, parameter, groups if dim == 0 else 1)
    parameter.data = padded


def _fill(tensor: Tensor, values: Tensor, parts: int) -> None:
    """Cut both tensors into parts along the first dimension, and put each of ``values`` at the beginning of its own."""
    targets, sources = (t.unflatten(0, (parts, -1)) for t in (tensor, values))
    targets[tuple(slice(size) for size in sources.shape)].copy_(sources)


@torch.no_grad()
@takes(*SOURCE, *IGNORED, renamed=TOKEN)
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    *,
    strict: bool = True,
    **source_options: Any,
) -> None:
    """Put the weights of the adapter at a path in the place of those of ``adapter_name``, which keeps its name.

    Weights of the same shapes and dtypes are copied in place; others too on a model that
    :func:`prepare_model_for_compiled_hotswap` has prepared. Where that is not so the tensor is replaced, and a compiled
    model compiles once more. Layers that the new adapter does not adapt are left without a change.

    Args:
        model: the model, compiled or not.
        model_name_or_path: the new adapter's folder or hub id.
        adapter_name: the adapter to replace.
        torch_device: accepted for peft's sake; weights go where the old ones are.
        strict: as for ``load_adapter``.
        **source_options: ``revision``, ``subfolder``, ``token``, ``local_files_only``, ``cache_dir``,
            ``force_download``; and keywords of peft without effect here.

    Raises:
        BindError: the new adapter does not fit the model. AdapterError: it adapts layers that the old one does not, or
        is of another method. MergeError: the old one is merged.
    """
    adapted = adapted_model(model)
    adapted.adapters.get(adapter_name)
    source = find_adapter(model_name_or_path, source_options)
    with adapted.adapters.changing((adapter_name,)):
        facts = partial(base_in_memory, adapted.adapters.catalog)
        _hotswap(adapted, open_checkpoint(source, strict=strict, base=facts), adapter_name)


@torch.no_grad()
@takes()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put tensors in the place of those of ``adapter_name``, as :func:`hotswap_adapter` does with those of files.

    Args:
        model: the model, compiled or not.
        state_dict: the tensors, by their names in the model's own state.
        adapter_name: the adapter to replace.
        config: the config of the new adapter.
        parameter_prefix: the beginning of the names of the adapter's tensors at a layer.

    Raises:
        UnknownAdapterError: there is no such adapter. BindError, AdapterError, MergeError: see :func:`hotswap_adapter`.
    """
    adapted = adapted_model(model)
    named = re.compile(rf"(\.{re.escape(parameter_prefix)}\w+)\.{re.escape(adapter_name)}(?=\.|$)")
    tensors = {PREFIX + named.sub(r"\1", key.removeprefix(PREFIX)): tensor for key, tensor in state_dict.items()}
    checkpoint = in_memory_checkpoint(config, tensors, f"the state dict for {adapter_name!r}")
    with adapted.adapters.changing((adapter_name,)):
        _hotswap(adapted, checkpoint, adapter_name)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ``AdapterError`` where the adapter of one config cannot take the place of the other's."""
    if config0.peft_type != config1.peft_type:
        raise AdapterError(
            f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}.",
            hint="Swap in an adapter of the same method; load_adapter(...) puts one of another beside it.",
        )


def _hotswap(model: AdaptedModel, checkpoint: Checkpoint, adapter_name: str) -> None:
    adapters = model.adapters
    entry = adapters.get(adapter_name)
    checkpoint = in_current_layout(checkpoint, adapters.catalog)
    config = targeted(checkpoint.config)
    plan = make_plan(config, method_of(config), checkpoint.tensors, adapters.catalog)
    if plan.problems:
        raise bind_error(plan, config, checkpoint.origin, len(checkpoint.tensors), adapters.catalog)
    _check_swappable(model, entry, checkpoint, plan)
    tensors = checkpoint.read(plan.keys)
    check_finite(tensors, checkpoint.origin)
    bindings = {(binding.site.id, type(binding.method)): binding for binding in plan.bindings}
    swaps = [
        (layer, share, bindings.get((layer.site.id, type(share.method))))
        for layer, share in entry.bound_layers()
        if share.key is not None
    ]
    for layer, share, binding in swaps:
        _check_tensors(layer, adapter_name, share, binding)
    bound = {layer.site.id for layer, _, binding in swaps if binding is not None}
    for layer, share, binding in swaps:
        _swap(layer, adapter_name, share, binding, tensors)
    entry.layers.idle = [name for name in entry.layers.names if name not in bound]
    _swap_shared(entry, plan, tensors)
    entry.config, entry.saved_config = config, None
    entry.remake_modules()
    entry.origin, entry.notes = checkpoint.origin, [*checkpoint.notes, *plan.notes]
    entry.tensors_bound = len(plan.keys)
    note_swapped(model, entry, checkpoint)
    base = model.get_base_model()
    if injected_in(base) is model:
        base.peft_config = model.peft_config


def _check_swappable(model: AdaptedModel, entry: Adapter, checkpoint: Checkpoint, plan: Plan) -> None:
    merged = entry.layers.merged(entry.name)
    if merged:
        raise MergeError(
            f"{entry.name!r} is merged into {merged[0]} and {len(merged) - 1} other layers.",
            hint="Call unmerge_adapter() first.",
        )
    check_hotswap_configs_compatible(entry.config, checkpoint.config)
    beyond = [b.site.id for b in plan.bindings if b.site.id not in entry.layers.by_id]
    reason = None
    if beyond:
        reason = f"adapts {len(beyond)} layers that {entry.name!r} does not (first: {beyond[0]})"
    elif isinstance(checkpoint.config, LoraConfig) and is_moved(checkpoint.config.init_lora_weights):
        start = checkpoint.config.init_lora_weights
        reason = (
            f"is for a base without its start (init_lora_weights={start!r}; convert_start=True saves it for this one)"
        )
    elif plan.whole_modules or entry.whole_modules.names:
        reason = "or the old one brings whole modules"
    if reason:
        raise AdapterError(
            f"{checkpoint.origin} cannot take the place of {entry.name!r}: it {reason}.",
            hint=f"Use load_adapter(...) and set_adapter(...), then delete_adapter({entry.name!r}).",
        )


def _check_tensors(layer: LayerAdapters, name: str, share: BoundAdapter, binding: Binding | None) -> None:
    hint = "Use load_adapter(...) and set_adapter(...) instead."
    if binding is None:
        # Zeros are no change for a sum alone; a DoRA of zeros would be one.
        if not all(patch.only_adds for patch in layer.patches([name])):
            raise AdapterError(
                f"The new adapter has nothing for {layer.site.id}, where {name!r} does more than add.", hint=hint
            )
    elif binding.keys.keys() != (leaves := {leaf.name for leaf in share.leaves}):
        raise AdapterError(
            f"{layer.site.id}: the new adapter has {sorted(binding.keys)}, and {name!r} has {sorted(leaves)}.",
            hint=hint,
        )


def _swap(
    layer: LayerAdapters, name: str, share: BoundAdapter, binding: Binding | None, tensors: Mapping[str, Tensor]
) -> None:
    live = layer.tensors(name, share)
    if binding is None:
        for parameter in live.values():
            # A bias is kept whole: that of the base is no change.
            parameter.copy_(base_bias(layer)) if isinstance(share.method, Bias) else parameter.zero_()
        layer.reset(name, share, share.settings)
        return
    for leaf, parameter in live.items():
        parts = layer.site.groups if RANK_DIMS.get(leaf) == 0 else 1
        _put(parameter, tensors[binding.keys[leaf]], _is_prepared(share.settings), parts)
    settings = settings_by_tensors(binding.method, binding.settings, live, layer)
    layer.reset(name, share, _settings(share.settings, settings))


def _is_prepared(settings: Any) -> bool:
    return isinstance(settings, LoraSettings) and isinstance(settings.scale, Tensor)


def _settings(old: Any, new: Any) -> Any:
    """Return the new adapter's settings; a scale that is a tensor of compiled code stays that tensor."""
    if not _is_prepared(old):
        return new
    old.scale.fill_(float(new.scale))
    return replace(new, scale=old.scale, padded=old.padded)


def _put(parameter: nn.Parameter, new: Tensor, padded: bool, parts: int = 1) -> None:
    """Copy ``new`` into ``parameter``, with zeros around it where that is ``padded``; else replace its data."""
    fits = new.ndim == parameter.ndim and all(a <= b for a, b in zip(new.shape, parameter.shape, strict=True))
    if (fits if padded else new.shape == parameter.shape) and new.dtype == parameter.dtype:
        parameter.zero_()
        _fill(parameter, new, parts)
    else:
        parameter.data = new.to(parameter.device, copy=True)


def _swap_shared(entry: Adapter, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    for leaf, key in plan.shared.items():
        _put(entry.shared[leaf], tensors[key], padded=False)
