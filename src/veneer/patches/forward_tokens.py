"""The tokens that a forward pass reads, and where an invocation among them begins (aLoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Where an adapter begins in a row in which it is not invoked.
NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class ForwardTokens:
    """The tokens that one forward pass of the base model reads.

    Attributes:
        ids: the tokens that decide, shape ``(rows, n)``: those that are read, or the prompt while generating.
        start: the number of positions that the cache holds before those that are read.
        length: the number of positions that are read.
        masks: invocation tokens -> the mask, worked out once a pass.
    """

    ids: Tensor
    start: int
    length: int
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def mask(self, invocation: tuple[int, ...]) -> Tensor:
        """Return where positions lie at or behind the last ``invocation`` of their row, shape ``(rows, length)``."""
        if invocation not in self.masks:
            begin = last_start(self.ids, invocation)
            positions = torch.arange(self.start, self.start + self.length, device=begin.device)
            self.masks[invocation] = positions >= begin.unsqueeze(1)
        return self.masks[invocation]


def last_start(ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """Return where the last ``invocation`` begins in each row of ``ids``, shape ``(rows,)``; ``NEVER`` without any."""
    tokens = torch.tensor(invocation, device=ids.device)
    if ids.shape[1] < len(tokens):
        return torch.full((ids.shape[0],), NEVER, device=ids.device)
    matches = (ids.unfold(1, len(tokens), 1) == tokens).all(-1)
    last = matches.shape[1] - 1 - matches.flip(1).int().argmax(1)
    return torch.where(matches.any(1), last, NEVER)
