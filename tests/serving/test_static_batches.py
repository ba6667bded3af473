"""A base that cannot be batched continuously is served in static batches, with the same answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf

from tests.models import TEXT
from tests.serving.engine_world import (
    CONFIGS,
    OPTIONS,
    World,
    base,
    events_of,
    lora,
    prompts,
    request,
    run,
    running,
    tokens_of,
)
from veneer.errors import EngineError
from veneer.printing import VeneerWarning
from veneer.serving import continuous_batching
from veneer.serving import engine as engine_module
from veneer.serving.engine import TransformersEngine
from veneer.serving.static_batches import StaticLane, StepGate

PROMPT = prompts(1)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def engine(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[TransformersEngine]:
    monkeypatch.setattr(engine_module, "batches_continuously", lambda model: False)
    with running() as engine:
        for name, folder in world.folders.items():
            run(engine.load(name, folder))
        yield engine


def test_mixed_requests_get_the_answers_of_their_adapters(engine: TransformersEngine, world: World) -> None:
    names = [None, *CONFIGS]
    asked = [
        request(number, prompt, names[number % len(names)], max_tokens=2 + number % 7)
        for number, prompt in enumerate(prompts(24))
    ]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, one) for one in asked))

    assert isinstance(engine._lane, StaticLane)
    assert run(main()) == [world.answer(one.version, one.prompt, one.sampling.max_tokens) for one in asked]


def test_the_bases_own_defaults_ask_for_nothing(engine: TransformersEngine, world: World) -> None:
    config = engine.model.get_base_model().generation_config
    config.update(eos_token_id=world.answer(None, PROMPT, 8)[2], repetition_penalty=5.0)
    assert run(tokens_of(engine, request(1, PROMPT))) == world.answer(None, PROMPT, 8)
    engine.stop(timeout=0.0)
    assert engine.model.get_base_model().generation_config is config


def test_adapters_come_and_go_within_a_batch(engine: TransformersEngine, world: World) -> None:
    async def main() -> Any:
        stays = asyncio.create_task(tokens_of(engine, request("stays", PROMPT, "r3", max_tokens=100)))
        await asyncio.sleep(0)
        for turn in range(5):
            await engine.drop("dora")
            assert turn or not stays.done()  # later ones may come after it on a slow machine
            await engine.load("dora", world.folders["dora"])
        answer = engine.generate(request(1, PROMPT, "r3", max_tokens=100))
        await anext(answer)
        with pytest.raises(EngineError, match="answers a request"):
            await engine.drop("r3")
        await answer.aclose()
        return await stays

    assert run(main()) == world.answer("r3", PROMPT, 100)


def test_a_cancelled_row_ends_alone(engine: TransformersEngine, world: World) -> None:
    async def main() -> Any:
        stays = asyncio.create_task(tokens_of(engine, request("stays", PROMPT, "r3", max_tokens=60)))
        answer = engine.generate(request(1, PROMPT, "dora", max_tokens=60))
        await anext(answer)
        await answer.aclose()
        assert {job.request.id for job in engine._lane.jobs.values()} <= {"stays"}
        return await stays

    assert run(main()) == world.answer("r3", PROMPT, 60)
    run(engine.drop("dora"))


def test_a_step_that_fails_ends_its_batch_alone(
    engine: TransformersEngine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not fit")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", fail)
        with pytest.raises(EngineError, match="shapes do not fit"):
            run(tokens_of(engine, request(1, PROMPT, "dora")))
    while not engine.status().restarts:
        pass
    assert run(tokens_of(engine, request(1, PROMPT, "dora"))) == world.answer("dora", PROMPT, 8)


def test_sampling_and_its_reports_are_the_same(
    engine: TransformersEngine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(1, PROMPT, "r8", max_tokens=12, temperature=1.0, seed=5, top_p=0.9, top_logprobs=2)
    static = run(events_of(engine, asked))
    monkeypatch.undo()
    with running() as continuous:
        run(continuous.load("r8", world.folders["r8"]))
        other = run(events_of(continuous, asked))
    assert [event.token for event in static] == [event.token for event in other]
    assert [event.finish for event in static] == [event.finish for event in other]
    for one, two in zip(static, other, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
        assert [each.token for each in one.alternatives] == [each.token for each in two.alternatives]


def lfm2() -> Any:
    torch.manual_seed(0)
    config = tf.Lfm2Config(
        **TEXT, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        layer_types=["conv", "full_attention", "conv"], max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.Lfm2ForCausalLM(config).float().eval()


def test_a_base_with_other_layers_is_served(tmp_path_factory: pytest.TempPathFactory) -> None:
    configs = {"one": lora(2, target_modules=["q_proj", "w1"]), "two": lora(3, target_modules=["in_proj", "w2"])}
    world = World(tmp_path_factory.mktemp("adapters"), configs, lfm2)
    asked = [request(number, prompt, [None, *configs][number % 3]) for number, prompt in enumerate(prompts(9))]

    async def main() -> list[list[int]]:
        for name, folder in world.folders.items():
            await engine.load(name, folder)
        return await asyncio.gather(*(tokens_of(engine, one) for one in asked))

    with running(model=lfm2()) as engine:
        assert isinstance(engine._lane, StaticLane)
        assert run(main()) == [world.answer(one.version, one.prompt, 8) for one in asked]


def test_a_base_that_answers_wrongly_when_batched_continuously_is_found_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = continuous_batching.ServedModel.forward

    def wrong(self: Any, **inputs: Any) -> Any:
        return computing(self, **{**inputs, "position_ids": inputs["position_ids"] * 0})

    monkeypatch.setattr(continuous_batching.ServedModel, "forward", wrong)
    engine = TransformersEngine(base(), OPTIONS)
    own_attention = pytest.warns(VeneerWarning, match="transformers' own attention")
    with own_attention, pytest.warns(VeneerWarning, match="static batches"):
        engine.start()
    assert isinstance(engine._lane, StaticLane)
    assert run(tokens_of(engine, request(1, PROMPT))) == world.answer(None, PROMPT, 8)
    engine.stop(timeout=0.0)


def test_the_gate_lets_no_step_run_while_it_is_closed() -> None:
    gate, steps, ends = StepGate(), [0], threading.Event()

    def work() -> None:
        while not ends.is_set():
            gate.enter()
            steps[0] += 1
            gate.leave()

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(50):
        with gate.closed(), gate.closed():
            seen = steps[0]
            ends.wait(0.001)
            assert steps[0] == seen
    ends.set()
    thread.join()
