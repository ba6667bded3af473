"""Lets an adapter act on some positions of its input only: from an invocation on (aLoRA).

A hook on the base model notes the tokens that each forward pass is about to read; a patch's :class:`TokenGate` makes a
mask of them when the patch is applied. While a model generates, the prompt decides once, whether a pass reads all
tokens or, with a cache, the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.errors import AdapterError
from veneer.patches.forward_call import current


@dataclass(frozen=True)
class TokenGate:
    """Chooses the positions from an invocation on.

    Attributes:
        invocation: its tokens.
        rows: the entries of the batch that the layer is given; all when ``None``.
        whole: the shape of the whole batch, ``(rows, length)`` or flattened, where only ``rows`` are given.
    """

    invocation: tuple[int, ...]
    rows: Tensor | None = None
    whole: torch.Size | None = None

    def take(self, rows: Tensor, whole: torch.Size) -> TokenGate:
        """Return the gate for some entries of a batch."""
        return replace(self, rows=rows, whole=whole)

    def choose(self, changed: Tensor, y: Tensor) -> Tensor:
        """Return ``changed`` where the adapter acts, and ``y`` elsewhere, both ``(rows, length, out)`` or flattened."""
        tokens = current().tokens
        if tokens is None:
            raise AdapterError(
                "An adapter with alora_invocation_tokens acts on some tokens only, and no token ids are known here.",
                hint="Give the model input_ids, not inputs_embeds; train without gradient checkpointing.",
            )
        mask = self._spread(tokens.mask(self.invocation), self.whole or y.shape[:-1]).to(y.device)
        return torch.where((mask if self.rows is None else mask[self.rows]).unsqueeze(-1), changed, y)

    def _spread(self, mask: Tensor, shape: torch.Size) -> Tensor:
        """Repeat the mask of the prompts' rows for as many as the layer sees, for beams of one row lie side by side."""
        copies, left = divmod(shape.numel(), mask.numel())
        if left or not copies:
            raise AdapterError(
                f"A layer was given {tuple(shape)} inputs, and the batch has {tuple(mask.shape)} tokens.",
                hint="An adapter with alora_invocation_tokens fits layers that see every token; leave out the others.",
            )
        return mask.repeat_interleave(copies, 0).reshape(shape)
