"""Ends an answer before the first of its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def settled(text: str, stops: Sequence[str]) -> str:
    """Return the part of an unfinished answer that belongs to it whatever follows."""
    ended = before_stop(text, stops)
    if ended != text:
        return ended
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)]


def stopping_criterion(
    decode: Callable[[Tensor], str], prompt_length: int, stops: Sequence[str]
) -> Callable[..., Tensor]:
    """Return what ``generate`` asks after each token: which rows hold a stop string behind the prompt."""

    def is_done(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        texts = [decode(row[prompt_length:]) for row in ids]
        return ids.new_tensor([before_stop(text, stops) != text for text in texts]).bool()

    return is_done
