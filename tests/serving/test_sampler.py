"""Each row is sampled as its own options say: as transformers' processors do, row by row."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.errors import EngineError
from veneer.serving import sampler
from veneer.serving.engine_types import Sampling, TokenLogprob
from veneer.serving.sampler import SamplingRow, SamplingState, check_sampling, choose

VOCAB = 40


def logits(rows: int = 1, vocabulary: int = VOCAB, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def row(prompt: list[int] | None = None, generated: list[int] | None = None, **options: Any) -> SamplingRow:
    return SamplingRow(SamplingState.of(Sampling(max_tokens=9, **options)), prompt or [5], generated or [])


def allowed(scores: Tensor, **options: Any) -> Tensor:
    """The probabilities that transformers' processors leave, in the order in which ``generate`` runs them."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    scores = tf.TemperatureLogitsWarper(options["temperature"])(None, scores)
    if options["top_k"]:
        scores = tf.TopKLogitsWarper(options["top_k"])(None, scores)
    if options["top_p"] < 1:
        scores = tf.TopPLogitsWarper(options["top_p"])(None, scores)
    if options["min_p"]:
        scores = tf.MinPLogitsWarper(options["min_p"])(None, scores)
    return scores.softmax(-1)


def drawn(scores: Tensor, monkeypatch: pytest.MonkeyPatch, steps: int = 4000, **options: Any) -> Tensor:
    """The shares of the tokens chosen at evenly spaced random numbers."""
    monkeypatch.setattr(SamplingState, "uniform", lambda self, place: place / steps)
    rows = [row(generated=[7] * place, **options) for place in range(steps)]
    return choose(scores.expand(steps, -1), rows).bincount(minlength=scores.shape[-1]) / steps


@pytest.mark.parametrize("likely", [4, 1024])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 5, "temperature": 1.7},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    ],
)
def test_the_shares_are_those_of_transformers(
    options: dict[str, Any], likely: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_LIKELY", likely)
    scores = logits()
    expected = allowed(scores, **options)[0]
    shares = drawn(scores, monkeypatch, **options)
    assert torch.allclose(shares, expected, atol=2e-3)
    assert not shares[expected == 0].any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.5, 1.0]),
                "top_k": st.sampled_from([0, 3]),
                "top_p": st.sampled_from([0.6, 1.0]),
                "min_p": st.sampled_from([0.0, 0.1]),
                "seed": st.integers(0, 5),
                "repetition_penalty": st.sampled_from([1.0, 1.3]),
                "top_logprobs": st.sampled_from([None, 2]),
            }
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_row_is_chosen_whatever_else_is_in_the_batch(options: list[dict[str, Any]]) -> None:
    scores = logits(len(options))
    rows = [row(generated=[3, 9], **each) for each in options]
    together = choose(scores.clone(), rows)
    for number, each in enumerate(options):
        alone = row(generated=[3, 9], **each)
        assert choose(scores[number : number + 1], [alone])[0] == together[number]
        assert alone.state.reported == rows[number].state.reported


def test_rows_at_temperature_zero_take_the_likeliest() -> None:
    scores = logits(3)
    rows = [row(temperature=0.0, seed=1), row(seed=1), row(temperature=0.0, top_p=0.1)]
    assert choose(scores, rows)[[0, 2]].tolist() == scores.argmax(-1)[[0, 2]].tolist()
    assert choose(scores, [None] * 3).tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-45, 1e-300])
def test_the_least_temperatures_take_the_likeliest_too(temperature: float) -> None:
    scores = logits(64)
    assert choose(scores, [row(temperature=temperature)] * 64).tolist() == scores.argmax(-1).tolist()


def test_a_seed_repeats_and_places_differ() -> None:
    def tokens(seed: int | None) -> list[int]:
        state = SamplingState.of(Sampling(max_tokens=9, seed=seed))
        return [int(choose(logits() * 0, [SamplingRow(state, [5], [1] * place)])) for place in range(30)]

    assert tokens(4) == tokens(4)
    assert tokens(4) != tokens(5)
    assert tokens(None) != tokens(None)
    assert len(set(tokens(4))) > 10


def test_penalties_and_biases() -> None:
    scores, prompt, generated = logits(), [1, 2, 2], [2, 3, 3, 3]
    options = {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {3: 0.7, 9: -50.0},
    }
    before = scores.clone()
    adjusted = sampler._adjusted(scores, [row(prompt, generated, **options)])[0]
    expected = tf.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([[*prompt, *generated]]), scores.clone())[0]
    for token, count in Counter(generated).items():
        expected[token] -= 0.3 + 0.2 * count
    expected[3] += 0.7
    expected[9] -= 50
    assert torch.allclose(adjusted, expected)
    assert torch.equal(scores, before)
    assert int(choose(scores, [row(temperature=0.0, logit_bias={11: 100.0})])) == 11


def test_log_probabilities_are_the_models_own() -> None:
    scores = logits()
    asked = row(temperature=0.0, top_logprobs=3, logit_bias={11: 100.0})
    choose(scores, [asked])
    logprobs = scores[0].log_softmax(-1)
    [sampled] = asked.state.reported
    assert sampled.logprob == pytest.approx(float(logprobs[11]))
    best = logprobs.topk(3)
    assert sampled.alternatives == tuple(map(TokenLogprob, best.indices.tolist(), best.values.tolist()))
    none = row(temperature=0.0, top_logprobs=0)
    choose(scores, [none])
    assert none.state.reported[0].alternatives == ()


@pytest.mark.parametrize("place", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_distribution_are_tokens_of_it(place: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingState, "uniform", lambda *_: place)
    scores = torch.full((1, VOCAB), -torch.inf)
    scores[0, 7] = scores[0, 12] = 1.0
    assert int(choose(scores, [row()])) == (12 if place else 7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_some_token_and_are_noted(value: float, temperature: float) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1] = value if value < 0 else torch.where(torch.arange(VOCAB) == 5, value, 0.0)
    rows = [row(temperature=temperature), row(temperature=temperature)]
    assert all(0 <= token < VOCAB for token in choose(logits, [*rows]).tolist())
    assert [one.state.is_finite for one in rows] == [True, False]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"repetition_penalty": 0.0},
        {"logit_bias": {VOCAB: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"top_logprobs": -1},
        {"stop": ("",)},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    check_sampling(Sampling(max_tokens=1), VOCAB)
    with pytest.raises(EngineError, match="out of range"):
        check_sampling(replace(Sampling(max_tokens=1), **options), VOCAB)
