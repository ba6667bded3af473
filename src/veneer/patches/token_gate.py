"""On which positions of its input an adapter acts, for those that do not act on all (aLoRA).

A hook on the base model notes what each forward pass is about to read; a patch's :class:`TokenGate` makes a mask of
it when the patch is applied. While a model generates, the prompt decides once, whether the pass reads all tokens or,
with a cache, the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.errors import AdapterError

# Where an adapter begins in a row in which it is not invoked.
NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class ForwardTokens:
    """What one forward pass of the base model reads.

    Attributes:
        ids: the tokens that decide, shape ``(rows, n)``: those that are read, or the prompt while generating.
        start: how many positions the cache holds before those that are read.
        length: how many positions are read.
        masks: invocation tokens -> the mask, worked out once a pass.
    """

    ids: Tensor
    start: int
    length: int
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def mask(self, invocation: tuple[int, ...]) -> Tensor:
        """Whether a position lies at or behind the last ``invocation`` of its row, shape ``(rows, length)``."""
        if invocation not in self.masks:
            begin = last_start(self.ids, invocation)
            positions = torch.arange(self.start, self.start + self.length, device=begin.device)
            self.masks[invocation] = positions >= begin.unsqueeze(1)
        return self.masks[invocation]


def last_start(ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """Where the last occurrence of ``invocation`` begins in each row of ``ids``, shape ``(rows,)``; else ``NEVER``."""
    wanted = torch.tensor(invocation, device=ids.device)
    if ids.shape[1] < len(wanted):
        return torch.full((ids.shape[0],), NEVER, device=ids.device)
    found = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
    last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
    return torch.where(found.any(1), last, NEVER)


@dataclass(frozen=True)
class TokenGate:
    """The positions from an invocation on.

    Attributes:
        invocation: its tokens.
        rows: which entries of the batch the layer is given; all when ``None``.
        whole: the shape of the whole batch, ``(rows, length)`` or flattened, where only ``rows`` are given.
    """

    invocation: tuple[int, ...]
    rows: Tensor | None = None
    whole: torch.Size | None = None

    def take(self, rows: Tensor, whole: torch.Size) -> TokenGate:
        """The same for some entries of a batch."""
        return replace(self, rows=rows, whole=whole)

    def choose(self, changed: Tensor, y: Tensor) -> Tensor:
        """``changed`` where the adapter acts and ``y`` elsewhere, both ``(rows, length, out)`` or flattened."""
        current = _PASS.get()
        if current is None:
            raise AdapterError(
                "An adapter with alora_invocation_tokens acts on some tokens only, and no token ids are known here.",
                hint="Give the model input_ids, not inputs_embeds; train without gradient checkpointing.",
            )
        mask = self._spread(current.mask(self.invocation), self.whole or y.shape[:-1]).to(y.device)
        return torch.where((mask if self.rows is None else mask[self.rows]).unsqueeze(-1), changed, y)

    def _spread(self, mask: Tensor, shape: torch.Size) -> Tensor:
        """A mask of the prompts' rows for as many as the layer sees: beams of one row lie side by side."""
        copies, left = divmod(shape.numel(), mask.numel())
        if left or not copies:
            raise AdapterError(
                f"A layer was given {tuple(shape)} inputs, and the batch has {tuple(mask.shape)} tokens.",
                hint="An adapter with alora_invocation_tokens fits layers that see every token; leave out the others.",
            )
        return mask.repeat_interleave(copies, 0).reshape(shape)


@contextmanager
def prompt_decides(ids: Tensor | None) -> Iterator[None]:
    """Inside the block, let the prompt ``ids`` decide for every forward pass."""
    token = _PROMPT.set(ids)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def record_tokens(model: nn.Module) -> list[RemovableHandle]:
    """Note from now on what each forward pass of a base model reads."""
    return [
        model.register_forward_pre_hook(_before, with_kwargs=True),
        model.register_forward_hook(_after, always_call=True),
    ]


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    prompt = _PROMPT.get()
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        _PASS.set(None)
        return
    start = int(cache.get_seq_length()) if cache is not None else 0
    _PASS.set(ForwardTokens(ids if prompt is None else prompt, start, ids.shape[1]))


def _after(module: nn.Module, args: Any, output: Any) -> None:
    _PASS.set(None)


_PASS: ContextVar[ForwardTokens | None] = ContextVar("veneer_pass", default=None)
_PROMPT: ContextVar[Tensor | None] = ContextVar("veneer_prompt", default=None)
