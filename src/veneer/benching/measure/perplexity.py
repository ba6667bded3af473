"""Measures how well a model predicts texts: ``exp`` of the mean negative log-likelihood of a token.

    perplexity = exp(-1/N sum_i log p(t_i | t_<i))        over all N predicted tokens of all texts, in float32

A text longer than a window is predicted in several: each after the first repeats half a window, whose tokens count only
as what stands before the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from veneer.benching.evaluation_samples import EvaluationSample
from veneer.errors import SourceError

# The most tokens that a model sees at a time.
WINDOW = 1024
# Rows of logits that are turned into float32 at a time.
_ROWS = 256


@dataclass(frozen=True)
class PredictedTokens:
    """The tokens of a text.

    Attributes:
        ids: the tokens, shape ``(n,)``.
        first: the index of the first that is predicted.
    """

    ids: Tensor
    first: int

    @property
    def count(self) -> int:
        """The number of predicted tokens."""
        return len(self.ids) - self.first


def tokenized(samples: Sequence[EvaluationSample], tokenizer: Any) -> list[PredictedTokens]:
    """Return the tokens of each sample, those left out in which no token follows another.

    Raises:
        SourceError: no token is left to predict, or the tokenizer has no chat template for messages.
    """
    texts = [_tokens(sample, tokenizer) for sample in samples]
    texts = [text for text in texts if text.count > 0]
    if not texts:
        where = samples[0].where.partition(", line ")[0]
        raise SourceError(f"{where} is too short: no token follows another.", hint="Give a longer text.")
    return texts


def _tokens(sample: EvaluationSample, tokenizer: Any) -> PredictedTokens:
    if isinstance(sample.before, str):
        given = _encoded(tokenizer, sample.before) if sample.before else []
        ids = _encoded(tokenizer, sample.before + str(sample.predicted))
    else:
        given = _chat(sample, tokenizer, sample.before, prompt=True) if sample.before else []
        ids = _chat(sample, tokenizer, [*sample.before, sample.predicted], prompt=False)
    shared = next((i for i, (a, b) in enumerate(zip(given, ids, strict=False)) if a != b), min(len(given), len(ids)))
    return PredictedTokens(torch.tensor(ids, dtype=torch.long), max(shared, 1))


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _chat(sample: EvaluationSample, tokenizer: Any, messages: list[Any], prompt: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise SourceError(
            f"{sample.where}: the tokenizer has no chat template for messages.",
            hint='Give records of {"prompt": "...", "completion": "..."}.',
        )
    try:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        )
    except Exception as error:  # a template is code of its own
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(
            f"{sample.where}: the chat template refuses the messages ({reason}).", hint="Check their roles and order."
        ) from error


@torch.inference_mode()
def perplexity_of(model: Any, texts: Iterable[PredictedTokens], window: int = WINDOW) -> float:
    """Return the perplexity of a model on texts.

    Args:
        model: a model that continues text, or a ``PeftModel`` of one, under its active adapters.
        texts: at least one.
        window: the most tokens that the model sees at a time, from 2 on.
    """
    total, count = 0.0, 0
    for text in texts:
        count += text.count
        for begin, first, end in windows(text, window):
            total += _loss(model, text.ids[begin:end], first - begin)
    return math.exp(total / count)


def windows(text: PredictedTokens, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield the windows that predict each token once: begin, first predicted token and end of each."""
    length, first = len(text.ids), text.first
    while first < length:
        begin = first - window // 2 if first >= window else 0
        end = min(begin + window, length)
        yield begin, first, end
        first = end


def _loss(model: Any, ids: Tensor, first: int) -> float:
    """Return the summed negative log-likelihood of the tokens from ``first`` on."""
    ids = ids.to(next(model.parameters()).device)
    output = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]))
    logits = output.logits[0, first - 1 : -1]
    return sum(
        float(functional.cross_entropy(rows.float(), targets, reduction="sum"))
        for rows, targets in zip(logits.split(_ROWS), ids[first:].split(_ROWS), strict=True)
    )
