"""Sites of layers with a matrix: ``nn.Linear``, and GPT-2's ``Conv1D``, which stores it transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from veneer.base_model.sites.site import Site


class LinearSite(Site):
    """``nn.Linear``: the stored weight is canonical."""

    matrix_input = True

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored.shape
        return rows, columns

    def canonical(self, stored: Tensor) -> Tensor:
        return stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def base_with(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        # A subclass may do more than multiply.
        if type(self.module).forward is nn.Linear.forward and len(args) == 1 and not kwargs:
            return F.linear(args[0], weight, bias)
        return super().base_with(weight, bias, *args, **kwargs)


class Conv1DSite(LinearSite):
    """GPT-2's ``Conv1D``: the stored weight is ``(in, out)``."""

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored.shape
        return columns, rows

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def base_with(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if is_plain_conv1d(self.module) and len(args) == 1 and not kwargs:
            return F.linear(args[0], weight.T, bias)
        return Site.base_with(self, weight, bias, *args, **kwargs)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is a ``Conv1D`` of transformers.

    It is told by where its class is defined, since to import transformers takes 0.6 s of a merge that needs nothing
    else of it: benchmarks/notes.md, The merge from disk to disk.
    """
    return any(_is_conv1d_class(kind) for kind in type(module).__mro__)


def is_plain_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is a ``Conv1D`` itself and no subclass of it, which may do more than multiply."""
    return _is_conv1d_class(type(module))


def _is_conv1d_class(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
