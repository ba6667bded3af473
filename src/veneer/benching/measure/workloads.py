"""Runs a model once for a measurement: a greedy answer where it can generate, else a forward pass.

Inputs are made from the model's config, so that any model of a known input can be measured without data of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from veneer.errors import UnsupportedError, UsageError

Inputs = dict[str, Tensor]
# Lengths that are measured by default.
USUAL = (128, 512)
# Tokens of a made question, for models without text.
_QUESTION = 32
# Ids below this are commonly special: padding, the beginning, the end.
_FIRST_ID = 3


@dataclass(frozen=True)
class Workload:
    """A way of running a model: its kind, and inputs for it.

    Attributes:
        kind: "causal" and "seq2seq" generate; "forward" runs once.
        unit: what a row is made of: "token", "image" or "frame".
        feed: rows and length -> the model's inputs; the length is 0 where the input has one size.
        limit: how long a row can be, its answer included; ``None`` when the config does not say.
        sized: whether rows have a length.
    """

    kind: str
    unit: str
    feed: Callable[[int, int], Inputs]
    limit: int | None
    sized: bool

    @property
    def decodes(self) -> bool:
        """True for a model that generates token by token."""
        return self.kind != "forward"

    @property
    def question_length(self) -> int:
        """The tokens of a made question, short enough to leave room for an answer."""
        return min(_QUESTION, max((self.limit or _QUESTION) // 2, 1)) if self.sized else 0

    def lengths(self, prompt_tokens: tuple[int, ...] | None, new_tokens: int) -> tuple[int, ...]:
        """Return the lengths of a row to measure: ``prompt_tokens``, else the usual lengths that fit.

        Raises:
            UsageError: a length is longer than the model takes.
        """
        if not self.sized:
            return ()
        room = self._room(new_tokens)
        if prompt_tokens is None:
            return tuple(length for length in USUAL if room is None or length <= room) or (max(room or 1, 1),)
        too_long = [length for length in prompt_tokens if room is not None and length > room]
        if too_long:
            raise UsageError(
                f"--prompt-tokens {max(too_long)} does not fit: the model takes {self.limit} tokens"
                + (f", and {new_tokens} are its answer's." if self.kind == "causal" else "."),
                hint=f"Ask for at most {room}." if room and room > 0 else "Ask for fewer --new-tokens.",
            )
        return prompt_tokens

    def _room(self, new_tokens: int) -> int | None:
        if self.limit is None:
            return None
        return self.limit - (new_tokens if self.kind == "causal" else 0)

    def run(self, model: Any, inputs: Inputs, new_tokens: int, **choice: Any) -> dict[str, float]:
        """Run the model once, and return seconds by quantity: "first" and "decode", or "forward".

        Args:
            model: a plain model or a ``PeftModel``.
            inputs: made by :attr:`feed`, on the model's device.
            new_tokens: how many to generate.
            **choice: ``adapter_names``, one for each row.
        """
        with torch.inference_mode():
            if self.decodes:
                return _generated(model, inputs, new_tokens, choice)
            started = now(inputs)
            model(**inputs, **choice)
            return {"forward": now(inputs) - started}


class TokenClock(StoppingCriteria):
    """Notes the time at which each token has been chosen, and stops nothing."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Note the time; no row is done."""
        self.times.append(now(self.inputs))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(inputs: Inputs) -> float:
    """Wait for the device to finish its work, and return the time in seconds."""
    device = next(iter(inputs.values())).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def generate(model: Any, inputs: Inputs, new_tokens: int, **options: Any) -> Tensor:
    """Generate a greedy answer of exactly ``new_tokens`` tokens."""
    ids: Tensor = model.generate(
        **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, **options
    )
    return ids


def _generated(model: Any, inputs: Inputs, new_tokens: int, choice: Mapping[str, Any]) -> dict[str, float]:
    clock = TokenClock(inputs)
    started = now(inputs)
    generate(model, inputs, new_tokens, stopping_criteria=[clock], pad_token_id=0, **choice)
    steps = max(len(clock.times) - 1, 1)
    return {"first": clock.times[0] - started, "decode": (clock.times[-1] - clock.times[0]) / steps}


def workload_of(model: Any, tokens: Tensor | None = None) -> Workload:
    """Choose the way of running a model, by its class and config.

    Args:
        model: a plain transformers model.
        tokens: ids of a text, shape ``(n,)``, from which rows are cut; random ids when ``None``.

    Raises:
        UnsupportedError: its input is of no known kind.
    """
    kind = "forward"
    if model.can_generate():
        kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
    name = model.main_input_name
    if name not in _FEEDS:
        raise UnsupportedError(
            f"veneer bench cannot make the input {name!r} of {type(model).__name__}.",
            hint=f"It can make: {', '.join(_FEEDS)}.",
        )
    return _FEEDS[name](model, kind, tokens)


def _text(model: Any, kind: str, tokens: Tensor | None) -> Workload:
    config = model.config.get_text_config()
    source = tokens if tokens is not None and len(tokens) else _random_ids(config.vocab_size)

    def feed(rows: int, length: int) -> Inputs:
        # Each row begins elsewhere in the text, so that rows differ.
        starts = torch.arange(rows)[:, None] * length
        ids = source[(starts + torch.arange(length)) % len(source)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Workload(kind, "token", feed, getattr(config, "max_position_embeddings", None), sized=True)


def _random_ids(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(_FIRST_ID, vocabulary - 1), vocabulary, (4096,), generator=generator)


def _images(model: Any, kind: str, tokens: Tensor | None) -> Workload:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _fixed("pixel_values", (config.num_channels, height, width), kind, "image", model.dtype)


def _frames(model: Any, kind: str, tokens: Tensor | None) -> Workload:
    # The convolution before the encoder halves the number of frames.
    shape = (model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return _fixed("input_features", shape, kind, "frame", model.dtype)


def _fixed(name: str, shape: tuple[int, ...], kind: str, unit: str, dtype: torch.dtype) -> Workload:
    def feed(rows: int, length: int) -> Inputs:
        return {name: torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)}

    return Workload(kind, unit, feed, None, sized=False)


_FEEDS: Mapping[str, Callable[[Any, str, Tensor | None], Workload]] = {
    "input_ids": _text,
    "pixel_values": _images,
    "input_features": _frames,
}
