"""The attention of a packed batch is that of each of its sequences alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.serving.engine_world import OPTIONS, base, prompts, request, run, running, tokens_of
from veneer.errors import UnsupportedError
from veneer.printing import VeneerWarning
from veneer.serving import packed_attention
from veneer.serving.engine import TransformersEngine
from veneer.serving.packed_attention import NAME, PackedBatch

HEADS, GROUPS, SIZE = 4, 2, 8


def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of the last tokens of one sequence."""
    parts = [query, *(part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))]
    queries, keys, values = (part.transpose(0, 1) for part in parts)
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=0.3).transpose(0, 1)


SEQUENCES = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 9)), st.integers(0, 70)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.booleans())
def test_each_sequence_has_its_own_attention(sequences: list[tuple[int, int]], from_cache: bool) -> None:
    earlier = [past if from_cache else 0 for _, past in sequences]
    tokens = [new for new, _ in sequences]
    keys = [new + past for new, past in zip(tokens, earlier, strict=True)]
    generator = torch.Generator().manual_seed(sum(keys))
    query = torch.randn(sum(tokens), HEADS, SIZE, generator=generator)
    key, value = (torch.randn(sum(keys), GROUPS, SIZE, generator=generator) for _ in range(2))
    places = torch.randperm(sum(keys), generator=generator)
    cached_key, cached_value = torch.empty_like(key), torch.empty_like(value)
    cached_key[places], cached_value[places] = key, value
    batch = PackedBatch.of(tokens, keys, places if from_cache else places[:0])
    read = (cached_key[batch.read_index], cached_value[batch.read_index]) if from_cache else (key, value)
    output = batch.attention(query, *read, scale=0.3)
    split = zip(query.split(tokens), key.split(keys), value.split(keys), strict=True)
    assert torch.allclose(output, torch.cat([alone(*parts) for parts in split]), atol=1e-5)


def test_padding_costs_less_than_twice_the_keys() -> None:
    lengths = [1000, 3, 40, 900, 33, 64, 2, 513]
    batch = PackedBatch.of([1] * 8, lengths, torch.arange(sum(lengths)))
    assert len(batch.read_index) < 2 * sum(lengths)
    assert not batch.prompts


def test_what_models_add_to_the_scores_is_refused() -> None:
    batch = PackedBatch.of([1], [1], torch.arange(0))
    with pytest.raises(UnsupportedError, match="softcap"):
        packed_attention.packed_attention(
            torch.nn.Module(), *3 * [torch.ones(1)], None, packed_batch=batch, softcap=1.0
        )


def test_an_engine_uses_it_where_it_can() -> None:
    with running() as engine:
        lane: Any = engine._lane
        assert engine.model.config._attn_implementation == NAME
        assert lane.manager.batch_processor.inputs_and_outputs.attention_mask is None
    assert engine.model.config._attn_implementation == "sdpa"


def test_an_engine_goes_on_without_it_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedBatch, "attention", lambda self, query, key, value, scale: query * 0)
    engine = TransformersEngine(base(), OPTIONS)
    with pytest.warns(VeneerWarning, match="transformers' own attention"):
        engine.start()
    monkeypatch.undo()
    asked = [request(number, prompt) for number, prompt in enumerate(prompts(4))]
    assert engine.model.config._attn_implementation == "sdpa"
    slow = [run(tokens_of(engine, one)) for one in asked]
    engine.stop(timeout=0.0)
    with running() as quick:
        assert slow == [run(tokens_of(quick, one)) for one in asked]
