"""A weight that somebody asked a layer for, and of which so far only the outside is wanted.

Models ask a layer that they call for its weight's dtype or device. The weight that the adapters make is worked out when
somebody computes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What is said without the values.
_OUTSIDE = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_quantized", "itemsize", "nbytes")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "element_size", "is_floating_point")),
}


class Unread(Tensor):
    """Stands for a tensor like ``outside``, whose values ``make`` gives once they are wanted."""

    outside: Tensor
    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, outside: Tensor, make: Callable[[], Tensor]) -> Unread:
        """A tensor of the shape, dtype and device of ``outside``, without memory."""
        found: Unread = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, outside.shape, strides=outside.stride(), dtype=outside.dtype, device=outside.device
        )
        found.outside, found.make = outside, make
        return found

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
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _read(func, args, kwargs)


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    own, named = tree_map_only(Unread, lambda weight: weight.make(), (args, kwargs or {}))
    return func(*own, **named)
