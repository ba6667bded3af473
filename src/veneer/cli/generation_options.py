"""Makes the options of ``generate`` and ``chat``, and turns them into those of transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import click

from veneer.cli.options import NumberRange, device, dtype
from veneer.errors import UsageError


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated.

    Attributes:
        keywords: for the model's ``generate``.
        stops: texts that end an answer.
        template: the chat template is used where the tokenizer has one.
        system: the system message of the chat.
        seed: of the sampling.
    """

    keywords: dict[str, Any]
    stops: list[str]
    template: bool
    system: str | None
    seed: int | None


def _seed(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    """Check a seed as torch takes it; a range of click's would stand in the help."""
    if value is not None and not 0 <= value < 2**63:
        raise UsageError(f"--seed {value} is out of range.", hint="Give a whole number from 0 to 2**63 - 1.")
    return value


def generation(most_tokens: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the options of a command that generates text, which takes them as ``generation``; and ``dtype``, ``device``.

    Args:
        most_tokens: the default of ``--max-new-tokens``.
    """
    decorators = (
        click.option(
            "--max-new-tokens",
            "--max-tokens",
            "max_new_tokens",
            type=click.IntRange(min=1),
            default=most_tokens,
            help="At most this many tokens.",
        ),
        click.option("--stop", multiple=True, help="End the answer before this text; may be given several times."),
        click.option("--system", help="The system message of the chat."),
        click.option(
            "--chat/--no-chat", "template", default=True, help="Use the tokenizer's chat template, if it has one."
        ),
        click.option(
            "--temperature",
            type=NumberRange(min=0),
            help="0 takes the likeliest token; by default 1 with --top-p or --top-k.",
        ),
        click.option("--top-p", type=NumberRange(0, 1), help="Sample from the likeliest tokens with this probability."),
        click.option("--top-k", type=click.IntRange(min=0), help="Sample from this many tokens; 0: from all."),
        click.option("--seed", type=int, callback=_seed, help="Of the sampling; 0 or more."),
        dtype,
        device,
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def combined(**options: Any) -> None:
            given = {name: options.pop(name) for name in _NAMES}
            command(generation=generation_options(**given), **options)

        for decorator in reversed(decorators):
            combined = decorator(combined)
        return combined

    return decorate


def generation_options(
    max_new_tokens: int,
    stop: Sequence[str],
    system: str | None,
    template: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
) -> GenerationOptions:
    """Check the options of a command, and return what they mean.

    Raises:
        UsageError: a stop string is empty, or a limit of sampling is given where nothing is sampled.
    """
    if "" in stop:
        raise UsageError("--stop is an empty string.", hint="Give the text that ends the answer.")
    keywords = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p, top_k)}
    return GenerationOptions(keywords, list(stop), template, system, seed)


_NAMES = tuple(signature(generation_options).parameters)


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
