"""Pins the selection of a call of a model: it uses from beginning to end what was selected when it began."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from contextvars import Token

import torch
from torch import Tensor

from veneer.adapters.collection import Adapters
from veneer.patches.forward_call import ForwardCall
from veneer.patches.selection import Selection


class Call:
    """Opens and closes a call of the model, as the ``with`` block around it.

    Args:
        adapters: of the model.
        chosen: the selection; the one of this context when ``None``.
        task_ids: the task of each row, shape ``(rows,)``.
        prompt: the tokens that decide for every pass while generating, shape ``(rows, n)``.

    Raises:
        UnknownAdapterError: on entering, when an adapter of the selection has been deleted or renamed.
    """

    __slots__ = ("_token", "adapters", "chosen", "prompt", "task_ids")

    def __init__(
        self,
        adapters: Adapters,
        chosen: Selection | None = None,
        task_ids: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> None:
        self.adapters = adapters
        self.chosen = chosen
        self.task_ids = task_ids
        self.prompt = prompt
        self._token: Token[ForwardCall] | None = None

    def __enter__(self) -> None:
        active = self.adapters.active_selection
        selection = self._begin()
        try:
            for name in selection.concerned:
                self.adapters.get(name)
            self._token = active.push(selection.for_call(self.task_ids), self, self.prompt)
        except BaseException:
            active.underway.end(self)
            raise

    def _begin(self) -> Selection:
        """Begin with the selection, and again if a change that had to be waited for made another."""
        active = self.adapters.active_selection
        while True:
            selection = self.chosen or active.current
            active.underway.begin(self, self._used(selection.concerned), active.calls)
            if self.chosen is not None or active.current is selection:
                return selection
            active.underway.end(self)

    def _used(self, names: tuple[str, ...]) -> Collection[str]:
        """Return ``names``, and those of the adapters that they mix."""
        entries = self.adapters.by_name
        mixed = [expert for name in names if name in entries for expert in entries[name].config.experts]
        return (*names, *mixed) if mixed else names

    def __exit__(self, *_: object) -> None:
        active = self.adapters.active_selection
        try:
            if self._token is not None:
                active.pop(self._token)
        finally:
            active.underway.end(self)


def call(
    adapters: Adapters,
    chosen: Selection | None = None,
    task_ids: Tensor | None = None,
    prompt: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Return the ``with`` block for one call of a model, as :class:`Call` has it.

    In compiled code, whose guards have read the selection, the block does no more than select.
    """
    if not torch.compiler.is_compiling():
        return Call(adapters, chosen, task_ids, prompt)
    if chosen is None and task_ids is None:
        return nullcontext()
    return adapters.using(dataclasses.replace(chosen or adapters.active_selection.current, task_ids=task_ids))
