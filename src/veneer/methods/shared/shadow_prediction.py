"""The prediction that SHADOW's small decoder makes by itself, and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def projected(states: Tensor, projection: nn.Module) -> Tensor:
    """Return the small decoder's last states in the base's width, ``(rows, length, hidden)``."""
    weight = next(projection.parameters(), None)
    return states if weight is None else projection(states.to(weight.dtype))


def prediction_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))


def last_tokens(state: Tensor, mask: Tensor | None) -> Tensor:
    """Return the state of each row's last token that is no padding, ``(rows, hidden)``."""
    if mask is None:
        return state[:, -1]
    # A prefix in the cache has a part of the mask, and no states.
    mask = mask[:, -state.shape[1] :].to(state.device)
    last = (mask.ne(0) * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return state[torch.arange(len(state), device=state.device), last]


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return transformers' loss of a number, of one class in several, or of several classes, as the labels are."""
    logits, labels = logits.float(), labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.flatten())
