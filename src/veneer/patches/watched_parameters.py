"""The parameters of adapters that are not trained: they tell when somebody reaches for their memory.

What inference keeps of an adapter is made anew when a tensor's version says that it was changed. ``p.data`` and
``p.detach().numpy()`` lead to the memory without a version, and are the usual way to exchange weights. A watched
parameter notes that they were asked for, and what was kept until then is made anew. Parameters that are trained stay
what they are, for optimizers are fastest with torch's own class: of those nothing is kept from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Edits:
    """What may have been written, of all models: another ``last`` each time."""

    last: object = object()


def edited() -> None:
    """Note that a tensor of an adapter may be written, or was exchanged."""
    Edits.last = object()


def _noted(name: str) -> Any:
    """A tensor's method, noted when it is called."""
    method = getattr(Tensor, name)

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            edited()
        return method(self, *args, **kwargs)

    call.__name__, call.__doc__ = name, method.__doc__
    return call


class Watched(nn.Parameter):
    """A parameter of an adapter that is not trained; in a pickle, a plain one."""

    @property
    def data(self) -> Tensor:
        """The values, without a version."""
        edited()
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        edited()
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    detach = _noted("detach")
    numpy = _noted("numpy")
    __array__ = _noted("__array__")
    __dlpack__ = _noted("__dlpack__")
    untyped_storage = _noted("untyped_storage")


def watch(parameters: Iterable[Tensor | None]) -> None:
    """Watch those parameters that are torch's own and want no gradient."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter and not parameter.requires_grad and not parameter.is_inference():
            parameter.__class__ = Watched


def leave_alone(parameters: Iterable[Tensor]) -> None:
    """Watch parameters no longer."""
    for parameter in parameters:
        if type(parameter) is Watched:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
