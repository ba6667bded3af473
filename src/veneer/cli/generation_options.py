"""Turns the options of ``generate`` and ``chat`` into those of transformers' ``generate``; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import UsageError


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated.

    Attributes:
        keywords: for the model's ``generate``.
        stops: texts that end an answer.
        template: the chat template is used where the tokenizer has one.
    """

    keywords: dict[str, Any]
    stops: list[str]
    template: bool


def generation_options(
    max_new_tokens: int,
    stops: Sequence[str],
    template: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> GenerationOptions:
    """Check the options of a command, and return what they mean.

    Raises:
        UsageError: a stop string is empty, or a limit of sampling is given where nothing is sampled.
    """
    if "" in stops:
        raise UsageError("--stop is an empty string.", hint="Give the text that ends the answer.")
    keywords = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p, top_k)}
    return GenerationOptions(keywords, list(stops), template)


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """Return the sampling options; without any, the likeliest token is taken."""
    limits = {name: limit for name, limit in (("top_p", top_p), ("top_k", top_k)) if limit is not None}
    if temperature is None:
        temperature = 1.0 if limits else 0.0
    if temperature:
        return {"do_sample": True, "temperature": temperature, **limits}
    if limits:
        raise UsageError(
            "--temperature 0 takes the likeliest token, and --top-p and --top-k are for sampling.",
            hint="Leave out one of them.",
        )
    return {"do_sample": False}
