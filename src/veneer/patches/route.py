"""Routes: changes of a layer's output that depend on its input.

A route has no matrix, so it is never merged or fused; a patch carries it beside its closed form.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Route(Protocol):
    """A change of a layer's output that is computed from the layer's input."""

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Return what is added to the layer's output for its input ``x``, shape ``(rows, ..., in)``."""
        ...

    def take(self, rows: Tensor, whole: torch.Size) -> Route:
        """Return the route for some rows of a batch whose input has the leading shape ``whole``."""
        ...

    def changes(self) -> bool:
        """Tell whether it can add anything but zero."""
        ...


class CacheableRoute:
    """A route that depends on its tensors and the input alone, so that inference may cache it."""

    def for_inference(self, dtype: torch.dtype) -> Route:
        """Return the route without dropout, in the form that is cheapest to run.

        Args:
            dtype: in which small products are cheapest.
        """
        raise NotImplementedError(f"{type(self).__name__} has no form for inference")
