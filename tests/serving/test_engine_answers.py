"""Answers as a client reads them: their text and end, log-probabilities, and seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import veneer
from tests.random_adapters import enlarge
from tests.serving.engine_world import (
    CONFIGS,
    World,
    base,
    events_of,
    prompts,
    request,
    run,
    running,
    tokenizer,
    tokens_of,
)
from veneer.errors import VeneerError
from veneer.serving.engine import TransformersEngine

PROMPTS = prompts(8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"), {name: CONFIGS[name] for name in ("r3", "dora", "ia3")})


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[TransformersEngine]:
    with running(words=tokenizer()) as engine:
        for name, folder in world.folders.items():
            run(engine.load(name, folder))
        yield engine


def answer(engine: TransformersEngine, asked: Any) -> tuple[str, str | None]:
    events = run(events_of(engine, asked))
    assert all(event.finish is None for event in events[:-1])
    return "".join(event.text for event in events), events[-1].finish


def test_the_text_is_the_tokenizers(engine: TransformersEngine, world: World) -> None:
    tokens = world.answer("r3", PROMPTS[0], 12)
    assert answer(engine, request(1, PROMPTS[0], "r3", 12)) == (tokenizer().decode(tokens), "length")


def test_a_stop_string_ends_an_answer(engine: TransformersEngine, world: World) -> None:
    words = tokenizer().decode(world.answer("r3", PROMPTS[0], 12)).split()
    stop = " ".join(words[3:5])
    text, finish = answer(engine, request(1, PROMPTS[0], "r3", 100, stop=("no such", stop)))
    assert (text, finish) == (" ".join(words).split(stop)[0], "stop")
    assert not engine._lane.jobs


def test_an_end_token_is_no_text(engine: TransformersEngine, world: World) -> None:
    tokens = world.answer("r3", PROMPTS[0], 12)
    assert engine._end_tokens == (2,)
    biased = {2: 1000.0}
    events = run(events_of(engine, request(1, PROMPTS[0], "r3", logit_bias=biased, ignore_eos=False)))
    assert [(event.token, event.text, event.finish) for event in events] == [(2, "", "stop")]
    assert len(tokens) == len(run(tokens_of(engine, request(1, PROMPTS[0], "r3", 12, logit_bias=biased))))


def test_a_seed_gives_the_same_whatever_else_is_in_the_batch(engine: TransformersEngine) -> None:
    def asked(number: int, **options: Any) -> Any:
        names = [None, "r3", "dora", "ia3"]
        return request(number, PROMPTS[number], names[number % 4], 20, temperature=1.2, **options)

    async def main() -> Any:
        alone = [await tokens_of(engine, asked(number, seed=number, top_p=0.9)) for number in range(4)]
        others = [asked(number) for number in range(4, 8)]
        seeded = [asked(number, seed=number, top_p=0.9) for number in range(4)]
        together = await asyncio.gather(*(tokens_of(engine, one) for one in [*others, *seeded]))
        other_seed = await tokens_of(engine, asked(0, seed=99, top_p=0.9))
        return alone, together[4:], other_seed

    alone, together, other_seed = run(main())
    assert alone == together
    assert alone[0] != other_seed


def test_greedy_rows_are_exact_among_rows_that_sample(engine: TransformersEngine, world: World) -> None:
    async def main() -> Any:
        sampled = [tokens_of(engine, request(number, PROMPTS[number], temperature=2.0)) for number in range(4)]
        greedy = [tokens_of(engine, request(number, PROMPTS[number], "dora")) for number in range(4, 8)]
        return (await asyncio.gather(*sampled, *greedy))[4:]

    assert run(main()) == [world.answer("dora", PROMPTS[number], 8) for number in range(4, 8)]


def test_log_probabilities_are_the_adapters(engine: TransformersEngine, world: World) -> None:
    events = run(events_of(engine, request(1, PROMPTS[1], "dora", 6, top_logprobs=3, repetition_penalty=2.0)))
    tokens = [event.token for event in events]
    logprobs = world.logits("dora", [*PROMPTS[1], *tokens]).log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
    for event, row in zip(events, logprobs, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        best = row.topk(3)
        assert [each.token for each in event.alternatives] == best.indices.tolist()
        assert torch.allclose(torch.tensor([each.logprob for each in event.alternatives]), best.values, atol=1e-4)
    assert run(events_of(engine, request(1, PROMPTS[1])))[0].logprob is None


@pytest.mark.parametrize(
    "config",
    [
        veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        veneer.LoraConfig(
            r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM", init_lora_weights=False
        ),
    ],
)
def test_what_no_packed_batch_can_run_is_refused_when_it_is_loaded(
    engine: TransformersEngine, world: World, config: Any, tmp_path: Any
) -> None:
    model = veneer.get_peft_model(base(), config)
    enlarge(model, "default")
    model.save_pretrained(tmp_path)
    with pytest.raises(VeneerError) as raised:
        run(engine.load("no", tmp_path))
    assert raised.value.hint
    assert "no" not in engine.model.adapters.by_name
    assert run(tokens_of(engine, request(1, PROMPTS[0], "r3"))) == world.answer("r3", PROMPTS[0], 8)
    assert engine.status().restarts == 0


def test_an_engine_of_a_folder_has_its_tokenizer(world: World, tmp_path: Any) -> None:
    base().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path)
    engine.start()
    try:
        run(engine.load("dora", world.folders["dora"]))
        expected = tokenizer().decode(world.answer("dora", PROMPTS[0], 8))
        assert answer(engine, request(1, PROMPTS[0], "dora")) == (expected, "length")
    finally:
        engine.stop(timeout=0.0)
