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
