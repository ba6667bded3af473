"""Reads and sets the base's own tensors under the names that they have without adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from veneer.errors import MergeError, StateMismatchError
from veneer.keywords import takes
from veneer.peft_model.adapted_model import adapted_model
from veneer.peft_model.base_checks import note_changed

# The parts of names in the state that wrappers add, and the names of the copies that adapters bring.
_WRAPPER = re.compile(r"\.(?:base_layer|original_module)(?=\.)")
_COPY = re.compile(r"\.modules_to_save\.")


@takes()
def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the base's tensors by the names that they have in its ``state_dict()`` without adapters.

    They share the memory of the model's. Of a layer that adapters are merged into, it is the weight without them.

    Args:
        model: the model with adapters, compiled or not.

    Raises:
        BaseModelError: it is another model.
    """
    adapted = adapted_model(model)
    layers = adapted.adapters.adapted_layers
    own = {id(t) for entry in adapted.adapters.by_name.values() for t in entry.tensors_by_place().values()}
    unmerged = {
        f"{layer.site.name}.{leaf}": tensor
        for layer in layers
        for leaf, tensor in zip((layer.site.parameter, "bias"), layer.original, strict=False)
        if tensor is not None
    }
    # By the tensor, which other modules may hold too.
    biases = {id(layer.own_bias): layer.bias_in_place.original for layer in layers if layer.bias_in_place is not None}
    state = adapted.get_base_model().state_dict(keep_vars=True)
    plain = {
        _WRAPPER.sub("", name): tensor
        for name, tensor in state.items()
        if id(tensor) in biases or (id(tensor) not in own and not _COPY.search(name))
    }
    tensors = {name: unmerged.get(name, tensor) for name, tensor in plain.items()}
    return {name: biases.get(id(tensor), tensor).detach() for name, tensor in tensors.items()}


@torch.no_grad()
@takes()
def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> _IncompatibleKeys:
    """Copy tensors into the base, by the names that they have without adapters.

    Args:
        model: the model with adapters, compiled or not.
        state_dict: as :func:`get_base_model_state_dict` returns it.
        strict: raise where a name is missing or unknown.

    Returns:
        ``missing_keys`` and ``unexpected_keys``.

    Raises:
        StateMismatchError: the names (with ``strict``) or a shape do not fit. MergeError: adapters are merged.
    """
    adapted = adapted_model(model)
    if any(layer.merged for layer in adapted.adapters.adapted_layers):
        raise MergeError("Adapters are merged into the base.", hint="Call unmerge_adapter() first.")
    current = get_base_model_state_dict(adapted)
    missing = [name for name in current if name not in state_dict]
    unexpected = [name for name in state_dict if name not in current]
    if strict and (missing or unexpected):
        raise StateMismatchError(
            f"The state is not the base's. Missing keys: {len(missing)} ({', '.join(missing[:3]) or 'none'}). "
            f"Unexpected keys: {len(unexpected)} ({', '.join(unexpected[:3]) or 'none'}).",
            hint="Give the state of the base without adapters, or pass strict=False.",
        )
    given = {name: tensor for name, tensor in state_dict.items() if name in current}
    unfit = [name for name, tensor in given.items() if tensor.shape != current[name].shape]
    if unfit:
        raise StateMismatchError(
            f"size mismatch for {unfit[0]}: {tuple(given[unfit[0]].shape)}, where the base has "
            f"{tuple(current[unfit[0]].shape)}.",
            hint="Give the state of the same base.",
        )
    with adapted.adapters.changing():
        for name, tensor in given.items():
            current[name].copy_(tensor)
        for layer in adapted.adapters.adapted_layers:
            layer.forget_cached()
    note_changed(adapted.get_base_model())
    adapted._base_digest = None
    return _IncompatibleKeys(missing, unexpected)
