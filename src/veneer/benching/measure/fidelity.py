"""Compares merged answers with unmerged ones: both are right, and a merge rounds to the weights' dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.benching.measure.models_compared import ModelsCompared
from veneer.benching.measure.workloads import Inputs, Workload
from veneer.benching.result import Fidelity

# Most tokens of an answer that are compared: a longer one says no more.
_TOKENS = 32


@dataclass
class _Tally:
    """Adds comparisons up."""

    drift: float = 0.0
    off: float = 0.0
    effect: float = 0.0
    positions: int = 0
    agreeing: int | None = 0
    texts: list[bool] = field(default_factory=list)

    def add(self, base: Tensor, unmerged: Tensor, merged: Tensor, likeliest: bool) -> None:
        """Add the outputs of one input; their last dimension is the vocabulary, or classes."""
        gap = (merged - unmerged).abs()
        self.drift = max(self.drift, float(gap.max() / unmerged.abs().max().clamp_min(1e-30)))
        self.off += float(gap.sum())
        self.effect += float((unmerged - base).abs().sum())
        self.positions += unmerged[..., 0].numel()
        if likeliest and self.agreeing is not None:
            self.agreeing += int((merged.argmax(-1) == unmerged.argmax(-1)).sum())
        else:
            self.agreeing = None


@torch.inference_mode()
def fidelity(models: ModelsCompared, adapter: str, new_tokens: int) -> Fidelity:
    """Compare one adapter merged with the same unmerged, on every question.

    A model that generates is compared along its own unmerged answer, so that one near tie does not make all later
    tokens differ; whole greedy answers are compared too.
    """
    model, workload = models.several, models.workload
    tokens = min(new_tokens, _TOKENS)
    tally = _Tally()
    model.set_adapter(adapter)
    answers = _answers(model, models, tokens)
    fed = [_along(workload, row, answer) for row, answer in zip(models.questions, answers, strict=True)]
    unmerged = [outputs(model, row)[0] for row in fed]
    model.merge_adapter([adapter])
    try:
        for row, before in zip(fed, unmerged, strict=True):
            after, likeliest = outputs(model, row)
            tally.add(outputs(models.base, row)[0], before, after, likeliest)
        again = _answers(model, models, tokens)
    finally:
        model.unmerge_adapter()
    same = [a is not None and torch.equal(a, b) for a, b in zip(answers, again, strict=True)]
    return Fidelity(
        adapter=adapter,
        prompts=len(fed),
        positions=tally.positions,
        drift=tally.drift,
        share_of_effect=tally.off / tally.effect if tally.effect else 0.0,
        agreement=None if tally.agreeing is None else tally.agreeing / tally.positions,
        same_texts=sum(same) if workload.decodes else None,
    )


def outputs(model: Any, inputs: Inputs) -> tuple[Tensor, bool]:
    """Return a forward pass's output, and whether it is logits (in float32), over tokens or classes."""
    output = model(**inputs)
    for name in ("logits", "start_logits"):
        if isinstance(output.get(name), Tensor):
            return output[name].float(), True
    hidden = output.get("last_hidden_state")
    return (hidden if isinstance(hidden, Tensor) else next(v for v in output.values() if isinstance(v, Tensor))), False


def _answers(model: Any, models: ModelsCompared, tokens: int) -> Sequence[Any]:
    """Generate the greedy answer to each question, its prompt included; ``None`` for a model that does not decode."""
    if not models.workload.decodes:
        return [None] * len(models.questions)
    options = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    return [model.generate(**row, **options) for row in models.questions]


def _along(workload: Workload, row: Inputs, answer: Tensor | None) -> Inputs:
    """Make the inputs of a forward pass over a question and its answer."""
    if answer is None:
        return row
    if workload.kind == "seq2seq":
        return {**row, "decoder_input_ids": answer}
    return {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
