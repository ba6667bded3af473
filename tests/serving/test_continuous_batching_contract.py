"""What ``serving/continuous_batching.py`` relies upon in transformers, beyond its documentation, is so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.generation.continuous_batching import scheduler as registry

from tests.serving.engine_world import OPTIONS, World, base, events_of, lora, prompts, request, run, running, tokens_of
from veneer.errors import EngineError
from veneer.serving import continuous_batching, packed_attention
from veneer.serving.continuous_batching import AdapterScheduler, ContinuousLane, batches_continuously
from veneer.serving.engine import TransformersEngine
from veneer.serving.lane import LaneLoad

PROMPTS = prompts(12, longest=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"), {"one": lora(2), "two": lora(3)})


@pytest.fixture
def engine(world: World) -> Iterator[TransformersEngine]:
    with running() as engine:
        for name, folder in world.folders.items():
            run(engine.load(name, folder))
        yield engine


def lane_of(engine: TransformersEngine) -> ContinuousLane:
    assert isinstance(engine._lane, ContinuousLane)
    return engine._lane


def test_the_scheduler_is_chosen_by_its_name(engine: TransformersEngine) -> None:
    assert registry.SCHEDULER_MAPPING["veneer"] is AdapterScheduler
    assert type(lane_of(engine).manager.batch_processor.scheduler) is AdapterScheduler


def test_nothing_is_shared_replayed_or_padded(engine: TransformersEngine) -> None:
    processor: Any = lane_of(engine).manager.batch_processor
    assert not processor.cache.use_prefix_sharing
    assert not processor.use_async_batching
    assert not processor.model_runner.pad_inputs
    assert processor.cb_config.use_cuda_graph == (False, False)
    assert not processor.do_sample
    assert [type(one).__name__ for one in processor.logit_processor.logits_processor] == ["RequestSampler"]


def test_sequences_are_packed_as_they_are_scheduled(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, steps, packed = lane_of(engine), [], []
    forward, schedule = engine.model.forward, AdapterScheduler.schedule_batch

    def scheduled(self: Any, *budgets: int) -> Any:
        batch = schedule(self, *budgets)
        packed[:] = [token for one in self.scheduled for token in one.state.tokens_to_process]
        return batch

    def recorded(**inputs: Any) -> Any:
        ends = torch.tensor([one.query_length for one in lane.scheduled]).cumsum(0) - 1
        new = [end for end, one in zip(ends.tolist(), lane.scheduled, strict=True) if one.has_new_token]
        names = [(lane.jobs[one.state.request_id].adapter, one.query_length) for one in lane.scheduled]
        # Rows behind those of new tokens are nobody's.
        steps.append(
            inputs["input_ids"][0].tolist() == packed
            and inputs["adapter_names"].names == names
            and inputs["logits_to_keep"][: len(new)].tolist() == new
        )
        return forward(**inputs)

    monkeypatch.setattr(AdapterScheduler, "schedule_batch", scheduled)
    monkeypatch.setattr(engine.model, "forward", recorded)
    asked = [request(number, prompt, [None, "one", "two"][number % 3]) for number, prompt in enumerate(PROMPTS)]
    run(gathered(engine, asked))
    assert len(steps) > 20
    assert all(steps)
    assert max(len(prompt) for prompt in PROMPTS) > OPTIONS.max_batch_tokens  # a prompt that takes several steps


async def gathered(engine: TransformersEngine, asked: Any) -> Any:
    import asyncio

    return await asyncio.gather(*(tokens_of(engine, one) for one in asked))


def test_requests_that_are_put_off_go_on_where_they_were(world: World) -> None:
    """The cache is too small for all of them, which transformers notices when it is full."""
    asked = [
        request(number, prompt[:20], ["one", "two"][number % 2], max_tokens=50, top_logprobs=0)
        for number, prompt in enumerate(PROMPTS)
    ]
    seeded = [
        replace(one, sampling=replace(one.sampling, temperature=1.0, seed=number)) for number, one in enumerate(asked)
    ]
    put_off: list[str] = []

    class Counting(AdapterScheduler):
        def add_waiting_request(self, state: Any) -> None:
            put_off.extend([state.request_id] * bool(state._true_initial_tokens))
            super().add_waiting_request(state)

    async def main(engine: TransformersEngine) -> Any:
        for name, folder in world.folders.items():
            await engine.load(name, folder)
        return await gathered(engine, asked), await gathered(engine, seeded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.SCHEDULER_MAPPING, "veneer", Counting)
        with running(replace(OPTIONS, cache_bytes=2 * 2 * 2 * 8 * 4 * 160)) as engine:
            small = run(main(engine))
    assert put_off
    with running() as engine:
        large = run(main(engine))
    assert small == large
    assert small[0] == [world.answer(one.version, one.prompt, 50) for one in asked]


def test_the_likeliest_of_the_scores_is_taken(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = torch.tensor([17])
    monkeypatch.setattr(continuous_batching, "choose", lambda scores, rows: chosen.expand(len(scores)))
    assert run(tokens_of(engine, request(1, PROMPTS[0]))) == [17] * 8


def test_an_end_token_ends_an_answer(engine: TransformersEngine, world: World) -> None:
    answer = world.answer(None, PROMPTS[0], 8)
    engine._end_tokens = (answer[3], 5)
    events = run(events_of(engine, request(1, PROMPTS[0], ignore_eos=False)))
    assert [event.token for event in events] == answer[: answer.index(answer[3]) + 1]
    assert events[-1].finish == "stop"
    assert run(tokens_of(engine, request(1, PROMPTS[0]))) == answer


def test_no_step_is_taken_while_it_is_paused(engine: TransformersEngine) -> None:
    lane = lane_of(engine)

    async def main() -> None:
        answer = engine.generate(request(1, PROMPTS[0], max_tokens=100))
        await anext(answer)
        with lane.paused():
            seen = lane.manager.current_batch
            time.sleep(0.1)
            assert lane.manager.current_batch == seen
        await anext(answer)
        await answer.aclose()

    run(main())


def test_a_dead_manager_takes_no_request(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = lane_of(engine).manager

    def fail(**_: Any) -> None:
        raise RuntimeError("no")

    engine._supervisor.end()
    monkeypatch.setattr(engine.model, "forward", fail)
    manager.add_request([1, 2, 3], request_id="a", max_new_tokens=2)
    while manager.is_running():
        time.sleep(0.01)
    assert isinstance(manager.background_thread_status.fatal_error, RuntimeError)
    assert manager.add_request([1, 2, 3]) is None
    assert str(lane_of(engine).failure) == "no"
    output = manager.get_result(timeout=5)
    assert (output.request_id, output.error) == ("a", "no")
    with pytest.raises(EngineError, match="not running"), lane_of(engine).paused():
        raise AssertionError("it was paused")


@pytest.mark.parametrize("shared", [False, True])
def test_prefixes_that_are_shared_would_give_wrong_answers(
    world: World, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """The guard is needed: the cache of a prompt under one adapter would be taken for another's."""
    config, prompt = continuous_batching.batching_config, prompts(9, longest=60)[8][:56]
    assert len(prompt) % OPTIONS.page_size == 0  # only whole pages are shared

    def sharing(*args: Any) -> Any:
        chosen = config(*args)
        chosen.allow_block_sharing = shared
        return chosen

    async def main() -> Any:
        for name, folder in world.folders.items():
            await engine.load(name, folder)
        return [await tokens_of(engine, request(name, prompt, name)) for name in world.folders]

    if shared:
        monkeypatch.setattr(continuous_batching, "batching_config", sharing)
    with running() as engine:
        processor: Any = lane_of(engine).manager.batch_processor
        assert processor.cache.use_prefix_sharing is shared
        first, second = run(main())
    one, two = (world.answer(name, prompt, 8) for name in world.folders)
    assert one != two
    assert first == one
    assert (second == two) is not shared


def test_a_cancelled_request_gives_its_cache_back_and_tells_nothing(engine: TransformersEngine) -> None:
    lane = lane_of(engine)
    manager: Any = lane.manager

    async def main() -> None:
        answer = engine.generate(request(1, PROMPTS[0], max_tokens=100))
        await anext(answer)
        assert lane.load().running == 1
        assert manager.batch_processor.cache.compute_free_capacity() < 1.0
        await answer.aclose()

    run(main())
    end = time.monotonic() + 10
    while lane.load() != LaneLoad(0, 0, 0.0):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not manager.output_router.result_handlers
    assert manager.output_router.output_queue.empty()
    assert manager.get_result(timeout=0) is None


def test_a_manager_that_ends_gives_the_base_its_attention_back(world: World) -> None:
    with running() as engine:
        lane, model = lane_of(engine), engine.model
        assert model.config._attn_implementation == packed_attention.NAME
        manager: Any = lane.manager
    assert not manager.is_running()
    assert model.config._attn_implementation == "sdpa"


def test_the_cache_bounds_a_request(world: World) -> None:
    with running(replace(OPTIONS, cache_bytes=2 * 2 * 2 * 8 * 4 * 64)) as engine:
        assert engine.max_context == 64
        assert len(run(tokens_of(engine, request(1, PROMPTS[0], max_tokens=64 - len(PROMPTS[0]))))) > 50
    with running(replace(OPTIONS, max_context=40)) as engine:
        assert engine.max_context == 40


def test_a_config_tells_what_can_be_batched() -> None:
    assert batches_continuously(TransformersEngine(base())._build())
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert not batches_continuously(TransformersEngine(mamba)._build())
