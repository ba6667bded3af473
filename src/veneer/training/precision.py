"""Prepares a model's dtypes and gradients for training in mixed precision, or on a packed (quantised) base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_model.sites.quantized.packed import packer
from veneer.errors import BaseModelError, UsageError
from veneer.keywords import takes
from veneer.peft_model.adapted_model import AdaptedModel

_HALF = (torch.float16, torch.bfloat16)
# Attributes by which transformers says that it has packed a model.
_PACKED = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
# The library whose packed layers take inputs of any dtype; those of the others want that of the rest of the model.
_ANY_DTYPE = "bitsandbytes"


@takes()
def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base model, cast its half-precision parameters to float32, and checkpoint activations if it is packed.

    Parameters stay in half precision where the base is packed by another library than bitsandbytes.

    Args:
        model: the base, before it is given adapters; changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass of a packed model, to save memory.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint``, such as ``{"use_reentrant": False}``.
        auto_clear_cache: give memory that the cast has freed back to the accelerator.

    Raises:
        BaseModelError: the model has adapters, which freezing would leave untrained.
    """
    if isinstance(model, AdaptedModel):
        raise BaseModelError(
            "prepare_model_for_kbit_training takes the base model, and this one has adapters, which it would freeze.",
            hint="Prepare the base first, and put the adapters on it afterwards.",
        )
    libraries = {library for module in model.modules() if (library := packer(module))}
    model.requires_grad_(False)
    if libraries <= {_ANY_DTYPE}:
        _cast(model, torch.float32, _HALF)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing and (libraries or any(getattr(model, name, False) for name in _PACKED)):
        _checkpoint_activations(model, dict(gradient_checkpointing_kwargs or {}))
    return model


@takes()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen parameters of a model to ``dtype``, and those that are trained to float32.

    Packed weights and parameters that are no floating-point numbers stay as they are.

    Args:
        model: the model, with its adapters; changed in place.
        dtype: such as ``torch.bfloat16``.

    Raises:
        UsageError: ``dtype`` is no floating-point dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype={dtype} is no floating-point dtype.", hint="Use torch.bfloat16 or torch.float16.")
    _cast(model, dtype)


def _cast(model: nn.Module, frozen: torch.dtype, dtypes: Collection[torch.dtype] = ()) -> None:
    """Cast frozen parameters, those of some dtypes or all, and trained ones to float32; packed weights stay."""
    packed = {id(p) for module in model.modules() if packer(module) for p in (module._parameters.get("weight"),)}

    def cast(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or id(tensor) in packed:
            return tensor
        if dtypes and tensor.dtype not in dtypes:
            return tensor
        return tensor.to(torch.float32 if tensor.requires_grad else frozen)

    model._apply(cast)


def _checkpoint_activations(model: Any, options: dict[str, Any]) -> None:
    """Recompute activations in the backward pass; with reentrant checkpoints, of inputs that need gradients."""
    # The newer name of the same; the older one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None:
        raise BaseModelError(
            f"{type(model).__name__} cannot checkpoint its activations.", hint="Pass use_gradient_checkpointing=False."
        )
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    enable(options)
