"""One face for every kind of base layer that can carry an adapter.

A weight is *canonical* as ``(out, in)``, whatever its layer stores. A site is that view of one live layer; the
layer itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Site:
    """One base layer ``y = W x + b``.

    Attributes:
        name: the layer's name in the base model.
        module: the live layer.
        transposed: whether ``module.weight`` lies as ``(in, out)``.
    """

    name: str
    module: nn.Module
    transposed: bool = False

    @property
    def stored(self) -> nn.Parameter:
        """The weight as the layer holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """Canonical ``(out, in)``."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def canonical(self, stored: Tensor) -> Tensor:
        """A view of a stored weight as ``(out, in)``; its own inverse."""
        return stored.T if self.transposed else stored

    def base(self, weight: nn.Parameter | None, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own output, computed with ``weight`` (as stored) in the place of its own if given."""
        if weight is None:
            result: Tensor = self.module(*args, **kwargs)
            return result
        changed: Tensor = functional_call(self.module, {"weight": weight}, args, kwargs)
        return changed

    def store(self, weight: nn.Parameter) -> None:
        """Put ``weight`` (as stored) into the layer. Another layer that shares the old one keeps the old one."""
        self.module.weight = weight


def _linear(name: str, module: nn.Module) -> Site:
    return Site(name, module)


def _conv1d(name: str, module: nn.Module) -> Site:
    return Site(name, module, transposed=True)


# Kinds that can carry an adapter, most common first; the first that fits a layer is used.
KINDS: tuple[tuple[type[nn.Module], Callable[[str, nn.Module], Site]], ...] = (
    (nn.Linear, _linear),
    (Conv1D, _conv1d),
)


def site_for(name: str, module: nn.Module) -> Site | None:
    """The site of a layer, or ``None`` when its kind cannot carry an adapter.

    Packed (quantised) weights and layers whose ``forward`` is never called are no sites: an adapter there would
    be a silent no-op or wrong.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    for kind, make in KINDS:
        if isinstance(module, kind):
            weight = getattr(module, "weight", None)
            usable = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()
            return make(name, module) if usable else None
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this layer."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)


def kinds() -> str:
    """The kinds of layer that can carry an adapter, for an error to name."""
    return ", ".join(kind.__name__ for kind, _ in KINDS)
