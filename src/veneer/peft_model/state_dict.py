"""Reads and replaces the tensors of one adapter as a dictionary with a checkpoint's keys."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from veneer.adapters import attach, replacing
from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.adapters.saved_embeddings import SaveEmbeddings, embeddings_to_save
from veneer.adapters.without_values import make_room
from veneer.checkpoints.checkpoint import in_memory_checkpoint
from veneer.checkpoints.layouts.key_mapping import with_keys
from veneer.checkpoints.layouts.older_layouts import in_current_layout
from veneer.errors import AdapterError, BindError, MergeError, UnsupportedError
from veneer.files.tensor_keys import PREFIX, SHARED_PREFIX, encode
from veneer.keywords import IGNORED, SOURCE, TOKEN, takes
from veneer.peft_model.adapted_model import AdaptedModel, adapted_model, injected_in
from veneer.peft_model.base_checks import note_changed
from veneer.peft_model.base_state import set_base_model_state_dict
from veneer.peft_model.open_adapter import find_adapter, open_adapter
from veneer.peft_model.save_adapters import value_of
from veneer.peft_model.trainer_state import adapter_state
from veneer.printing import warn

# What wrappers add to the names of a model's state.
_WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module)\.")


@takes()
def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, Tensor]:
    """Return checkpoint key -> tensor of one adapter, in the dtype that it has in memory.

    The tensors share the memory of the model's where both hold the same values. Of a base model that adapters were
    injected into, the keys do not begin with ``base_model.model.``, as in peft.

    Args:
        model: the model with adapters, compiled, in FSDP or plain. In FSDP1 it gathers the tensors, so that all
            processes have to call this.
        state_dict: take the tensors from here, as named by ``model.state_dict()``.
        adapter_name: the adapter.
        unwrap_compiled: accepted for peft's sake; a compiled model is always unwrapped.
        save_embedding_layers: as for ``save_pretrained``.

    Raises:
        UnknownAdapterError: there is no such adapter. AdapterError: ``state_dict`` has none of its tensors.
    """
    if state_dict is None and type(model).__name__ == "FullyShardedDataParallel":
        state_dict = model.state_dict()
    prefix = _prefix_of(model)
    model = adapted_model(model)
    state = {prefix + _WRAPPED.sub("", name): tensor for name, tensor in (state_dict or {}).items()}
    if state_dict is not None and adapter_state(model).keys().isdisjoint(state):
        raise AdapterError(
            "state_dict holds no tensor of the model's adapters.",
            hint="Give the state of the PeftModel itself, with its names, or leave state_dict out.",
        )
    with model.adapters.active_selection.choosing:
        adapter = model.adapters.get(adapter_name)
        value = value_of(model, adapter, state)
        tensors = _tensors_by_key(adapter, value)
        embeddings = embeddings_to_save(model.adapters, adapter, save_embedding_layers)
        tensors = {**{key: value(t) for key, t in embeddings.items() if key not in tensors}, **tensors}
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


@torch.no_grad()
@takes()
def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Give an adapter on a model the values of a dictionary with a checkpoint's keys.

    The values are copied into the adapter's tensors, so that an optimizer goes on with them. Where memory holds
    other tensors than a checkpoint (a prompt's encoder, VB-LoRA's logits), the adapter is put in place anew. Biases
    that the adapter does not train are given to the base's own layers, as in peft.

    Args:
        model: the model with adapters, compiled or not.
        peft_model_state_dict: as :func:`get_peft_model_state_dict` or :func:`load_peft_weights` returns it.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave out tensors of other shapes, with a warning.
        low_cpu_mem_usage: accepted for peft's sake; tensors without memory get it.

    Returns:
        ``missing_keys``, the adapter's tensors that got no value, by their names in ``model.state_dict()``; and
        ``unexpected_keys``, the keys that the adapter does not have.

    Raises:
        UnknownAdapterError: there is no such adapter. BindError: a shape is another.
        NonFiniteError: a value is not finite. MergeError: the adapter is merged.
    """
    prefix = _prefix_of(model)
    model = adapted_model(model)
    adapters = model.adapters
    adapter = adapters.get(adapter_name)
    make_room(adapters, adapter)
    shared = {SHARED_PREFIX + leaf for leaf in adapter.shared}
    given = {
        key if key.startswith(prefix) or key in shared else prefix + key: t for key, t in peft_model_state_dict.items()
    }
    _check_can_be_set(model, adapter)
    origin = f"the state dict for {adapter_name!r}"
    checkpoint = in_current_layout(in_memory_checkpoint(adapter.config, given, origin), adapters.catalog)
    current = _tensors_by_key(adapter)
    ends = embeddings_to_save(adapters, adapter, True) if hasattr(adapters.model, "get_input_embeddings") else {}
    rows = {key: tensor for key, tensor in ends.items() if key not in current}
    known = {**rows, **current}
    tensors = checkpoint.read(key for key in checkpoint.tensors if key in known)
    unfit = [key for key, tensor in tensors.items() if tensor.shape != known[key].shape]
    if unfit:
        mismatch = _mismatch(origin, unfit, tensors, known)
        if not ignore_mismatched_sizes:
            raise mismatch
        warn(mismatch.message + " What fits is used (ignore_mismatched_sizes=True).")
    fitting = {key: tensor for key, tensor in tensors.items() if key not in unfit}
    attach.check_finite(fitting, origin)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    missing = [names.get(id(tensor), key) for key, tensor in current.items() if key not in fitting]
    biases = _base_biases(adapters, [key for key in checkpoint.tensors if key not in known])
    if biases:
        values = checkpoint.read(biases)
        attach.check_finite(values, origin)
        set_base_model_state_dict(model, {name: values[key] for key, name in biases.items()}, strict=False)
    _set_values(model, adapter, current, rows, fitting)
    unexpected = [key for key in checkpoint.tensors if key not in known and key not in biases]
    return _IncompatibleKeys(*([key.removeprefix(prefix) for key in keys] for keys in (missing, unexpected)))


@takes(*SOURCE, *IGNORED, renamed=TOKEN)
def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read the tensors of the adapter at a path or hub id: checkpoint key -> tensor.

    Args:
        model_id: the adapter's folder or hub id.
        device: the device to put them on; the CPU when ``None``.
        key_mapping: regular expression -> replacement for its matches in the keys.
        **hf_hub_download_kwargs: ``revision``, ``subfolder``, ``token``, ``local_files_only``, ``cache_dir``,
            ``force_download``; and keywords of peft without effect here.

    Raises:
        SourceError: there is no adapter, or it cannot be read.
    """
    checkpoint = open_adapter(find_adapter(model_id, hf_hub_download_kwargs), strict=False)
    if key_mapping:
        checkpoint = with_keys(checkpoint, key_mapping)
    tensors = checkpoint.read(checkpoint.tensors)
    return {key: tensors[key].to(device or "cpu", copy=True) for key in checkpoint.tensors}


def _prefix_of(model: Any) -> str:
    """Return the beginning of keys that the names in a model's own state lack: none for a PeftModel."""
    return PREFIX if injected_in(getattr(model, "_orig_mod", model)) is not None else ""


def _tensors_by_key(adapter: Adapter, value: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Tensor]:
    """Return the tensors that are saved; in place of those that change when they are saved, those in memory."""
    tensors = dict(adapter.named_tensors(value))
    for layer, share in adapter.bound_layers():
        if share.key is not None and not all(leaf.saved for leaf in share.leaves):
            for leaf, tensor in layer.tensors(adapter.name, share).items():
                if share.method.leaf(leaf).saved:
                    tensors[encode(share.key, leaf)] = value(tensor)
    return tensors


def _check_can_be_set(model: AdaptedModel, adapter: Adapter) -> None:
    if adapter.layers.merged(adapter.name):
        raise MergeError(
            f"{adapter.name!r} is merged; the base's weights would keep the old values.",
            hint="Call unmerge_adapter() first.",
        )
    if adapter.swappable:
        raise UnsupportedError(f"{adapter.name!r} is prepared for hot-swapping.", hint="Use hotswap_adapter(...).")
    if model.adapters.is_spread:
        raise UnsupportedError(
            "This model is spread over processes; a state dict cannot be set on it.",
            hint="Load the adapter from its folder with load_adapter(...).",
        )


def _base_biases(adapters: Adapters, keys: Iterable[str]) -> dict[str, str]:
    """Return key -> its tensor's name in the base, for those keys that name the bias of a base's layer."""
    ends = {key: key.removeprefix(PREFIX).replace(".base_layer", "") for key in keys}
    modules = {key: name.removesuffix(".bias") for key, name in ends.items() if name.endswith(".bias")}
    held = {name for name, module in adapters.catalog.modules.items() if module._parameters.get("bias") is not None}
    return {key: f"{name}.bias" for key, name in modules.items() if name in held}


def _mismatch(origin: str, unfit: list[str], given: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> BindError:
    key = unfit[0]
    return BindError(
        f"{origin}: {len(unfit)} tensors have another shape than the adapter's; size mismatch for {key}: "
        f"{tuple(given[key].shape)}, where the adapter has {tuple(known[key].shape)}.",
        hint="Give the adapter the config that they were trained with, or pass ignore_mismatched_sizes=True.",
    )


def _set_values(
    model: AdaptedModel,
    adapter: Adapter,
    current: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> None:
    """Copy values into an adapter's tensors and the base's embeddings; put the adapter anew where it has no such."""
    adapters = model.adapters
    places = {id(tensor) for tensor in adapter.tensors_by_place().values()}
    with adapters.changing():
        if any(id(tensor) not in places for key, tensor in current.items() if key in values):
            _replace(model, adapter, {**current, **{k: t.to(current[k]) for k, t in values.items() if k in current}})
        else:
            for key in values.keys() & current.keys():
                current[key].copy_(values[key])
            adapter.note_zero_layers()
        _set_rows(model, rows, values)


def _set_rows(model: AdaptedModel, rows: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give the base's embeddings the rows that were saved with an adapter."""
    for key in values.keys() & rows.keys():
        if not torch.equal(rows[key], values[key].to(rows[key])):
            rows[key].copy_(values[key])
            note_changed(model.get_base_model())


def _replace(model: AdaptedModel, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter with these tensors in the place of one on the model."""
    adapters, name = model.adapters, adapter.name
    origin, digest = adapter.origin, adapter.base_digest
    values = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    checkpoint = in_memory_checkpoint(copy.deepcopy(adapter.config), values, f"the state dict for {name!r}")
    fresh = attach.load(adapters, replacing.spare(adapters, name), checkpoint, trainable=adapter.trainable)
    new = replacing.replace(adapters, name, fresh.name)
    new.origin, new.base_digest = origin, digest
    model.load_log.sync()
