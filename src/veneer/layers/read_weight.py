"""A weight that is made when somebody computes with it, and until then answers for its shape, dtype and device.

Models ask a layer that they call for its weight's dtype or device. The weight that the adapters make is worked out when
somebody computes with it. A kernel with a backward pass of its own computes where no gradient is noted, so that it
would train nothing: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from veneer.errors import UnsupportedError

# The questions that are answered without the values.
_OUTSIDE = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_quantized", "itemsize", "nbytes")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "element_size", "is_floating_point")),
}


class Unread(Tensor):
    """A tensor like ``outside``, whose values ``make`` gives once they are computed with."""

    outside: Tensor
    make: Callable[[], Tensor]
    noted: bool

    @staticmethod
    def __new__(cls, outside: Tensor, make: Callable[[], Tensor]) -> Unread:
        """Make a tensor of the shape, dtype and device of ``outside``, without memory."""
        unread: Unread = Tensor._make_wrapper_subclass(
            cls, outside.shape, strides=outside.stride(), dtype=outside.dtype, device=outside.device
        )
        unread.outside, unread.make, unread.noted = outside, make, torch.is_grad_enabled()
        return unread

    def __init__(self, outside: Tensor, make: Callable[[], Tensor]) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outside, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _OUTSIDE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _read(func, args, kwargs)


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    args, kwargs = tree_map_only(Unread, _values, (args, kwargs or {}))
    return func(*args, **kwargs)


def _values(weight: Unread) -> Tensor:
    if torch.is_grad_enabled() or not weight.noted:
        return weight.make()
    with torch.enable_grad():
        values = weight.make()
    if values.requires_grad:
        raise UnsupportedError(
            "The model gives the weight of an adapted layer to a kernel through which no gradient would reach the "
            "adapter.",
            hint="Train without that kernel, or leave such layers out of target_modules.",
        )
    return values
