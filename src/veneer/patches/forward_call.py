"""The state of the call of a model that is under way: what was selected for it, and what hooks note for the layers.

    begin, end      around a call of the model, or a block in which something else is selected
    note            in a hook before a pass of the base
    forget_after    registers the hook that empties what was noted when the pass has ended
    current         in the layers

One context variable holds it, so threads and async tasks do not see each other's. A state is never changed: another
takes its place, which does not reach the contexts that were copied before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.patches.selection import NOTHING, Selection

if TYPE_CHECKING:
    from veneer.patches.forward_tokens import ForwardTokens


@dataclass(slots=True)
class ForwardCall:
    """The state of one call of a model, or of a block in which something is selected.

    Attributes:
        owner: the ``ActiveSelection`` of the model; ``None`` outside of any call.
        selection: the adapters that it uses, with the tasks of its rows.
        call: stands for it among the calls under way; ``None`` for a block.
        outer: the call or block that it is inside of.
        prompt: the tokens that decide for every pass while generating, shape ``(rows, n)``.
        tokens: the tokens that the pass reads, for aLoRA.
        weighted_labels: the labels of a prompt that has a loss of its own, and the weight of each.
        xlora_weights: id of an X-LoRA's config -> the weights of its experts, ``(rows, length, layers, experts)``.
        shadow_states: name of a SHADOW adapter -> its states now, ``(its rows, length, hidden)``.
        first_shadow_states: the same at the beginning of the pass.
        shadow_seeds: name of a SHADOW adapter -> what makes its first states of the first block's input and call, where
            they cannot be had before.
    """

    owner: object = None
    selection: Selection = NOTHING
    call: object = None
    outer: ForwardCall | None = None
    prompt: Tensor | None = None
    tokens: ForwardTokens | None = None
    weighted_labels: tuple[Tensor, Tensor] | None = None
    xlora_weights: Mapping[int, Tensor] | None = None
    shadow_states: dict[str, Tensor] | None = None
    first_shadow_states: Mapping[str, Tensor] | None = None
    shadow_seeds: Mapping[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] | None = None


# The state outside of any call.
_IDLE = ForwardCall()
_CURRENT: ContextVar[ForwardCall] = ContextVar("veneer_forward_call", default=_IDLE)

current = _CURRENT.get
end = _CURRENT.reset


def begin(owner: object, selection: Selection, call: object, prompt: Tensor | None) -> Token[ForwardCall]:
    """Begin a call or block, which ends when :func:`end` is given the token."""
    outer = current()
    if outer is _IDLE:
        return _CURRENT.set(ForwardCall(owner, selection, call, None, prompt))
    prompt = outer.prompt if prompt is None else prompt
    return _CURRENT.set(replace(outer, owner=owner, selection=selection, call=call, outer=outer, prompt=prompt))


def note(**values: Any) -> None:
    """Let fields of the state have other values from now on."""
    _CURRENT.set(replace(current(), **values))


def forget_after(module: nn.Module, *fields: str) -> RemovableHandle:
    """Register the hook that empties fields of the call's state when a pass of ``module`` has ended."""
    return module.register_forward_hook(partial(_forget, fields), always_call=True)


def _forget(fields: tuple[str, ...], *_: Any) -> None:
    if any(getattr(current(), field) is not None for field in fields):
        note(**dict.fromkeys(fields))


def selected_tasks(length: int) -> Tensor | None:
    """Return the task of each row of a batch of ``length``, as the call that is under way names them."""
    return current().selection.tasks(length)
