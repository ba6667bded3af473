"""Dropout that is drawn from a seed, so that the seed is kept in the place of a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.patches.plain_calls import is_captured, is_eager

# The values of an input that are in float32 at a time: 4 MB on a CPU; elsewhere as many as keep a product quick.
CPU_VALUES, DEVICE_VALUES = 1 << 20, 1 << 24


@dataclass(frozen=True)
class Dropout:
    """Drops a share of an input's entries, the same ones each time: no mask has to be kept.

    Attributes:
        share: from 0 to below 1.
        seed: of the generator that draws the masks.
    """

    share: float = 0.0
    seed: int = 0

    @staticmethod
    def drawn(share: float) -> Dropout:
        """Return dropout with a seed from torch's CPU generator, whose state checkpointing restores."""
        return Dropout(share, int(torch.randint(1 << 62, (), device="cpu"))) if share else _NONE

    @property
    def gain(self) -> float:
        """The factor that makes up for what is dropped."""
        return 1 / (1 - self.share)

    def masked_parts(self, x: Tensor) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Return the :func:`parts` of ``x``, shape ``(rows, in)``, without what is dropped, and the mask of each."""
        return self._masked_parts(x) if self.share else [(part, None) for part in parts(x, x)]

    def _masked_parts(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(x.device).manual_seed(self.seed)
        for part in parts(x, x):
            mask = torch.empty(part.shape, dtype=torch.bool, device=x.device)
            mask.bernoulli_(1 - self.share, generator=generator)
            yield part * mask, mask


_NONE = Dropout()


def parts(tensor: Tensor, x: Tensor) -> Iterable[Tensor]:
    """Return parts of a tensor that has the rows of ``x``, so small that their float32 forms take little memory."""
    if is_one_part(x):
        return (tensor,)
    rows = _rows_of_part(x)
    # One by one, and not by split(): autograd lets these be changed in place.
    return (tensor[start : start + rows] for start in range(0, len(x), rows))


def is_one_part(x: Tensor) -> bool:
    """Tell whether ``x``, shape ``(rows, in)``, is small enough to be one of the :func:`parts`."""
    return len(x) <= _rows_of_part(x)


def _rows_of_part(x: Tensor) -> int:
    values = CPU_VALUES if x.is_cpu else DEVICE_VALUES
    return max(1, values // max(1, x.shape[-1]))


def seeds_dropout(x: Tensor, share: float) -> bool:
    """Tell whether dropout of ``x`` is drawn from a seed: a captured CUDA graph would repeat the one of its capture."""
    return share < 1 and is_eager(x) and not is_captured(x)


def dropped(x: Tensor, share: float) -> Tensor:
    """Return ``x`` with a share of its entries dropped: the same ones as in a node, from the same random state."""
    if not seeds_dropout(x, share):
        return F.dropout(x, share)
    dropout = Dropout.drawn(share)
    masked = [part for part, _ in dropout.masked_parts(x.reshape(-1, x.shape[-1]))]
    return (torch.cat(masked) * dropout.gain).view(x.shape)
