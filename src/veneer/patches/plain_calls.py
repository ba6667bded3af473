"""Tells where torch computes in the plain way: on plain tensors at once, and a layer by its weight alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from veneer.patches.watched_parameters import Watched

_PLAIN_TYPES = (Tensor, nn.Parameter, Watched)


def is_eager(*tensors: Tensor) -> bool:
    """Tell whether torch computes with plain tensors at once, as a node with a backward pass of its own needs it."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES or tensor.is_meta:
            return False
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def is_captured(x: Tensor) -> bool:
    """Tell whether a CUDA graph of what happens to ``x`` is being captured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def plain_linear(base: Any, x: Tensor) -> nn.Linear | None:
    """Return a base layer that is a frozen product with its weight and nothing more; ``None`` for any other."""
    if not is_plain(base):
        return None
    weight = base._parameters["weight"]
    return base if type(weight) in _PLAIN_TYPES and weight.dtype is product_dtype(x) else None


def is_plain(base: Any) -> bool:
    """Tell whether a base layer is torch's own ``nn.Linear``, frozen and without hooks."""
    if type(base) is not nn.Linear or _has_hooks(base):
        return False
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))  # type: ignore[union-attr]


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "forward" in module.__dict__ or torch_module._has_any_global_hook()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a layer's product with ``x``: autocast's, where that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
