"""A change that depends on the input: what it adds to a layer's output is computed from what the layer reads.

Such a change has no matrix, so it is never merged or folded; a patch carries it beside its closed form.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Route(Protocol):
    """What a routed method lowers to."""

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """What is added to the layer's output for its input ``x``, shape ``(rows, ..., in)``."""
        ...

    def take(self, rows: Tensor, whole: torch.Size) -> Route:
        """The same for some rows of a batch whose input has the leading shape ``whole``."""
        ...

    def changes(self) -> bool:
        """Whether it can add anything but zero."""
        ...


class CacheableRoute:
    """A route that nothing but its tensors and the input decides, so that inference may keep it."""

    def for_inference(self, dtype: torch.dtype) -> Route:
        """The same, without dropout, in the form that is cheapest to run.

        Args:
            dtype: in which small products are cheapest.
        """
        raise NotImplementedError(f"{type(self).__name__} has no form for inference")
