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
    """Return what ``generate`` asks after each token: which rows hold a stop string behind the prompt.

    It has looked at all earlier tokens before, and decodes as many of the last as a stop string can span.
    """
    # A token is a byte at least; as many again for tokens that mean no text where they stand.
    span = 2 * max(len(stop.encode(errors="surrogatepass")) for stop in stops) + 16

    def is_done(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        start = max(prompt_length, ids.shape[1] - span)
        texts = [decode(row[start:]) for row in ids]
        return ids.new_tensor([before_stop(text, stops) != text for text in texts]).bool()

    return is_done
