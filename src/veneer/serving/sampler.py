"""Chooses the next token of each row of a batch, every row by its own request's options.

A row's choice depends on its own logits, options, seed and place alone. With temperature 0 it takes the likeliest
token, without noise; with a seed it chooses the same again, whatever else is in the batch.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.errors import EngineError
from veneer.serving.engine_types import Sampling, TokenLogprob

# The likeliest tokens among which the bound of top_p is looked for before all are sorted.
_LIKELY = 1024
# Logits divided by a temperature up to this are infinite or nearly so: only the likeliest token is left.
_GREEDY = 1e-5


@dataclass(frozen=True)
class SampledToken:
    """The log-probabilities that belong to one generated token."""

    logprob: float
    alternatives: tuple[TokenLogprob, ...]


@dataclass
class SamplingState:
    """The options of one request, and what was told of its tokens.

    Attributes:
        sampling: the options.
        seed: the request's own, or a random one.
        reported: an entry for each token generated, where log-probabilities are asked for.
        is_finite: False once the likeliest token had a logit that is no number.
    """

    sampling: Sampling
    seed: int
    reported: list[SampledToken] = field(default_factory=list)
    is_finite: bool = True

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingState:
        """Make the state of a request, with a random seed where it has none."""
        seed = random.SystemRandom().getrandbits(63) if sampling.seed is None else sampling.seed
        return cls(sampling, seed)

    def uniform(self, place: int) -> float:
        """Return the random number in [0, 1) of the ``place``-th generated token."""
        return random.Random(f"{self.seed}:{place}").random()


@dataclass(frozen=True)
class SamplingRow:
    """A row of the logits, and what its request has so far.

    Attributes:
        state: of the request.
        prompt: the prompt's tokens.
        generated: the tokens generated before.
    """

    state: SamplingState
    prompt: Sequence[int]
    generated: Sequence[int]


def choose(logits: Tensor, rows: Sequence[SamplingRow | None]) -> Tensor:
    """Return the next token of each row, shape ``(rows,)``, and note what is to be reported of it.

    Args:
        logits: float32, shape ``(rows, vocabulary)``.
        rows: ``None`` for a row whose token nobody needs, as those behind the last are. Logits that are not finite
            give some token, and are noted.
    """
    adjusted = _adjusted(logits, rows)
    highest, chosen = adjusted.max(-1)
    _note_finite(highest, rows)
    for options, numbers in _groups(rows).items():
        scores = _filtered(adjusted[numbers] / options.temperature, options)
        places = [_uniform(rows[number]) for number in numbers]
        chosen[numbers] = _drawn(scores.softmax(-1), torch.tensor(places, device=scores.device))
    _report(logits, rows, chosen)
    return chosen


def _note_finite(highest: Tensor, rows: Sequence[SamplingRow | None]) -> None:
    """Note the rows whose tokens mean nothing: the highest of logits is NaN where one of them is."""
    for row, is_finite in zip(rows, highest.isfinite().tolist(), strict=False):
        if row is not None and not is_finite:
            row.state.is_finite = False


def check_sampling(options: Sampling, vocabulary: int) -> None:
    """Raise ``EngineError`` for options that no token can be chosen by."""
    penalties = options.presence_penalty, options.frequency_penalty
    checks = {
        "temperature": 0.0 <= options.temperature < math.inf,
        "top_k": options.top_k >= 0,
        "top_p": 0.0 < options.top_p <= 1.0,
        "min_p": 0.0 <= options.min_p <= 1.0,
        "presence_penalty and frequency_penalty": all(map(math.isfinite, penalties)),
        "repetition_penalty": 0.0 < options.repetition_penalty < math.inf,
        "logit_bias": all(map(math.isfinite, options.logit_bias.values()))
        and all(0 <= token < vocabulary for token in options.logit_bias),
        "top_logprobs": options.top_logprobs is None or options.top_logprobs >= 0,
        "stop": all(options.stop),
    }
    wrong = next((name for name, valid in checks.items() if not valid), None)
    if wrong is not None:
        raise EngineError(f"The request's {wrong} is out of range.", hint="See the table of the options.")


@dataclass(frozen=True)
class _Filters:
    """The options that rows must have in common to be sampled together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def _groups(rows: Sequence[SamplingRow | None]) -> dict[_Filters, list[int]]:
    """Return the numbers of the rows that sample, by their options."""
    groups: dict[_Filters, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row is not None and row.state.sampling.temperature > _GREEDY:
            options = row.state.sampling
            groups[_Filters(options.temperature, options.top_k, options.top_p, options.min_p)].append(number)
    return groups


def _uniform(row: SamplingRow | None) -> float:
    assert row is not None  # of a group
    return row.state.uniform(len(row.generated))


def _drawn(probabilities: Tensor, places: Tensor) -> Tensor:
    """Return the token at each row's place in its cumulative distribution.

    This needs one random number for a row, and Gumbel noise one for each token of the vocabulary.
    """
    sums = probabilities.double().cumsum(-1)
    total = sums[:, -1:]
    bounds = torch.minimum(places.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Logits that are not finite have no such place.
    return torch.searchsorted(sums, bounds, right=True)[:, 0].clamp_(max=sums.shape[-1] - 1)


# -- penalties and biases ----------------------------------------------------------------------------------


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow | None]) -> Tensor:
    """Return the logits with penalties and biases; the same tensor where there are none."""
    changed = [number for number, row in enumerate(rows) if row is not None and _adjusts(row.state.sampling)]
    if not changed:
        return logits
    logits = logits.clone()
    for number in changed:
        row = rows[number]
        assert row is not None
        _adjust(logits[number], row)
    return logits


def _adjusts(options: Sampling) -> bool:
    penalties = options.presence_penalty, options.frequency_penalty, options.repetition_penalty - 1.0
    return any(penalties) or bool(options.logit_bias)


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """Change one row's logits in place."""
    options = row.state.sampling
    if options.repetition_penalty != 1.0:
        seen = _tokens(sorted({*row.prompt, *row.generated}), logits)
        scores, penalty = logits[seen], options.repetition_penalty
        logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if row.generated and (options.presence_penalty or options.frequency_penalty):
        tokens, counts = _tokens(row.generated, logits).unique(return_counts=True)
        logits[tokens] -= options.frequency_penalty * counts + options.presence_penalty
    if options.logit_bias:
        bias = torch.tensor(list(options.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits[_tokens(options.logit_bias, logits)] += bias


def _tokens(tokens: Iterable[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=logits.device)


# -- filters, in the order in which transformers applies them ----------------------------------------------


def _filtered(scores: Tensor, options: _Filters) -> Tensor:
    """Return the scores with minus infinity for the tokens that top_k, top_p and min_p leave out."""
    if 0 < options.top_k < scores.shape[-1]:
        least = scores.topk(options.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if options.top_p < 1.0:
        scores = scores.masked_fill(scores < _top_p_bounds(scores, options.top_p), -torch.inf)
    if options.min_p > 0.0:
        probabilities = scores.softmax(-1)
        least = options.min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores


def _top_p_bounds(scores: Tensor, top_p: float) -> Tensor:
    """Return the least score that top_p keeps in each row, shape ``(rows, 1)``."""
    normaliser = scores.logsumexp(-1, keepdim=True)
    likely = scores.topk(min(_LIKELY, scores.shape[-1])).values
    before = (likely - normaliser).exp().cumsum(-1)
    if bool((before[:, -1] < top_p).any()):
        likely = scores.sort(-1, descending=True).values
        before = (likely - normaliser).exp().cumsum(-1)
    # A token stays while those before it have less than top_p together; the first one always.
    kept = 1 + (before[:, :-1] < top_p).sum(-1, keepdim=True)
    return likely.gather(-1, kept - 1)


# -- log-probabilities -------------------------------------------------------------------------------------


def _report(logits: Tensor, rows: Sequence[SamplingRow | None], chosen: Tensor) -> None:
    """Note the log-probabilities of the chosen tokens, and of alternatives, for the rows that ask for them."""
    for number, row in enumerate(rows):
        count = None if row is None else row.state.sampling.top_logprobs
        if row is None or count is None:
            continue
        logprobs = logits[number].log_softmax(-1)
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        alternatives = tuple(TokenLogprob(token, value) for token, value in pairs)
        row.state.reported.append(SampledToken(float(logprobs[chosen[number]]), alternatives))
