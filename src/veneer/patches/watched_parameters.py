"""Parameters of adapters that are not trained, which note when somebody reaches for their memory.

What inference keeps of an adapter is made anew when a tensor's version says that it was changed. ``p.data`` and
``p.detach().numpy()`` lead to the memory without a version, and are the usual way to exchange weights. A watched
parameter notes that they were asked for, and what was kept until then is dropped. Parameters that are trained stay
what they are, for optimizers are fastest with torch's own class: of those nothing is kept from one call to the next.

A base's parameter is watched only while merged copies are made from it (:class:`WatchedBase`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Edits:
    """Holds a token that is replaced each time a tensor of any model may have been written."""

    last: object = object()


def note_edit() -> None:
    """Note that a tensor of an adapter may be written, or was exchanged."""
    Edits.last = object()


def _noting_edit(name: str) -> Any:
    """Return a tensor's method that notes an edit when it is called."""
    method = getattr(Tensor, name)

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            note_edit()
        return method(self, *args, **kwargs)

    call.__name__, call.__doc__ = name, method.__doc__
    return call


class Watched(nn.Parameter):
    """A parameter of an adapter that is not trained; in a pickle, a plain one."""

    @property
    def data(self) -> Tensor:
        """The values, without a version."""
        note_edit()
        values: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return values

    @data.setter
    def data(self, value: Tensor) -> None:
        note_edit()
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    detach = _noting_edit("detach")
    numpy = _noting_edit("numpy")
    __array__ = _noting_edit("__array__")
    __dlpack__ = _noting_edit("__dlpack__")
    untyped_storage = _noting_edit("untyped_storage")


def detached(tensor: Tensor) -> Tensor:
    """Return a tensor without its history, to be read only: no edit is noted."""
    return Tensor.detach(tensor)


def watch(parameters: Iterable[Tensor | None]) -> None:
    """Watch those parameters that are torch's own and want no gradient."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter and not parameter.requires_grad and not parameter.is_inference():
            parameter.__class__ = Watched


def unwatch(parameters: Iterable[Tensor]) -> None:
    """Stop watching parameters, and drop what inference kept of them."""
    for parameter in parameters:
        if type(parameter) is Watched:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
            note_edit()


def _ending_watch(name: str) -> Any:
    """Return a tensor's method that makes the parameter a plain one when it is called."""
    method = getattr(Tensor, name)

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        unwatch_base(self)
        return method(self, *args, **kwargs)

    call.__name__, call.__doc__ = name, method.__doc__
    return call


class WatchedBase(nn.Parameter):
    """A base's parameter from which merged copies are made; a plain one once somebody reaches for its memory.

    ``detach`` is not watched, for whoever saves the base calls it. What is done in place to the result counts in the
    parameter's own version.
    """

    @property
    def data(self) -> Tensor:
        """The values, without a version."""
        unwatch_base(self)
        values: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return values

    @data.setter
    def data(self, value: Tensor) -> None:
        # ``model.to(...)`` that moves nothing sets what is there already.
        if not _is_same_memory(self, value):
            unwatch_base(self)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    numpy = _ending_watch("numpy")
    __array__ = _ending_watch("__array__")
    __dlpack__ = _ending_watch("__dlpack__")

    # The two of nn.Parameter read ``data``.
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, OrderedDict())


def watch_base(parameters: Iterable[Tensor]) -> None:
    """Watch parameters of the base that are torch's own."""
    for parameter in parameters:
        if type(parameter) is nn.Parameter:
            parameter.__class__ = WatchedBase


def unwatch_base(*parameters: Tensor) -> None:
    """Make parameters of the base plain ones again."""
    for parameter in parameters:
        if type(parameter) is WatchedBase:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    alike = (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
    return alike and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
