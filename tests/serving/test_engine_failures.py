"""A failure ends the requests that it concerns, with an error that says so, and no others; nothing is left of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import build
from tests.random_adapters import edit_config, edit_tensors
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
from veneer.errors import AdapterError, BindError, EngineError, UnsupportedError, VeneerError
from veneer.serving.canary import Canary
from veneer.serving.engine import TransformersEngine
from veneer.serving.supervisor import DeathLog

PROMPT = prompts(1)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"), {name: CONFIGS[name] for name in ("r3", "dora")})


@pytest.fixture
def engine(world: World) -> Iterator[TransformersEngine]:
    with running() as engine:
        for name, folder in world.folders.items():
            run(engine.load(name, folder))
        yield engine


def left(engine: TransformersEngine) -> dict[str, Any]:
    """What a request holds, once the engine has had a moment to let go."""
    deadline = time.monotonic() + 5
    lane: Any = engine._lane
    while True:
        processor = lane.manager.batch_processor
        held = {
            "jobs": len(lane.jobs),
            "active": len(processor.scheduler.active_requests),
            "waiting": len(processor.scheduler.waiting_requests),
            "handlers": len(lane.manager.output_router.result_handlers),
            "cache": 1.0 - processor.cache.compute_free_capacity(),
            "leases": lane.bank.status().leases,
            "outputs": lane.manager.output_router.output_queue.qsize(),
        }
        if not any(held.values()) or time.monotonic() > deadline:
            return {name: value for name, value in held.items() if value}
        time.sleep(0.01)


def fail_under(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Let each step raise that has an adapter in it."""
    forward = engine.model.forward

    def failing(*args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if adapter_names is not None and name in adapter_names.versions:
            raise error
        return forward(*args, adapter_names=adapter_names, **kwargs)

    monkeypatch.setattr(engine.model, "forward", failing)


# -- a step that fails -------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    engine: TransformersEngine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_under(engine, monkeypatch, "dora", RuntimeError("shapes do not fit"))
    for expected in (1, 2):
        with pytest.raises(EngineError, match="shapes do not fit"):
            run(tokens_of(engine, request(1, PROMPT, "dora")))
        assert wait_for(lambda: engine.status().alive and engine.status().restarts, expected)
        assert run(tokens_of(engine, request(2, PROMPT, "r3"))) == world.answer("r3", PROMPT, 8)
        assert run(tokens_of(engine, request(3, PROMPT))) == world.answer(None, PROMPT, 8)
    status = engine.status()
    assert status.quarantined.keys() == {"dora"}
    assert "2 failures" in status.quarantined["dora"]
    assert "shapes do not fit" in str(status.error)
    with pytest.raises(EngineError, match="quarantined"):
        run(tokens_of(engine, request(4, PROMPT, "dora")))
    assert not left(engine)

    monkeypatch.undo()
    run(engine.load("dora", world.folders["dora"]))
    assert run(tokens_of(engine, request(5, PROMPT, "dora"))) == world.answer("dora", PROMPT, 8)


def wait_for(value: Any, expected: Any) -> bool:
    deadline = time.monotonic() + 5
    while value() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(value() == expected)


def test_a_version_is_loaded_while_the_engine_is_started_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with pytest.raises(EngineError):
            await tokens_of(engine, request(1, PROMPT, "r3"))
        await engine.load("dora", world.folders["dora"])

    with running() as engine:
        run(engine.load("r3", world.folders["r3"]))
        fail_under(engine, monkeypatch, "r3", RuntimeError("no"))
        run(main())
        assert run(tokens_of(engine, request(2, PROMPT, "dora"))) == world.answer("dora", PROMPT, 8)


def test_deaths_count_within_their_window() -> None:
    now = 0.0
    log = DeathLog(lambda: now)
    log.note(RuntimeError("a"), {"one", "two"})
    log.note(MemoryError("b"), {"one"})
    log.note(torch.OutOfMemoryError("c"), {"one"})
    assert not log.quarantined
    now = 301.0
    log.note(RuntimeError("d"), {"one"})
    assert not log.quarantined
    log.note(RuntimeError("e"), {"one", "three"})
    assert log.quarantined.keys() == {"one"}
    log.forgive("one")
    log.note(RuntimeError("f"), {"one"})
    assert not log.quarantined


def test_a_step_that_hangs_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    async def main() -> Any:
        answer = asyncio.create_task(tokens_of(engine, request(1, PROMPT)))
        while engine.status().alive:
            await asyncio.sleep(0.01)
        status = engine.status()
        goes_on.set()
        return status, await answer

    with running(replace(OPTIONS, step_timeout=0.3)) as engine:
        forward = engine.model.forward
        monkeypatch.setattr(engine.model, "forward", lambda **inputs: goes_on.wait(20) and forward(**inputs))
        status, answer = run(main())
        assert "0.3 s" in str(status.error)
        assert answer == world.answer(None, PROMPT, 8)
        assert engine.status().alive


# -- requests that cannot be answered ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(1, PROMPT, "absent"), "not loaded"),
        (request(1, PROMPT * 41), "there is room for 128"),
        (request(1, PROMPT, max_tokens=500), "there is room for 128"),
        (request(1, PROMPT, max_tokens=0), "at least one token"),
        (request(1, []), "needs a prompt"),
        (request(1, [*PROMPT, 99]), "the token 99"),
        (request(1, [-1]), "the token -1"),
        (request(1, PROMPT, temperature=float("nan")), "temperature"),
        (request(1, PROMPT, min_p=2.0), "min_p"),
        (request(1, PROMPT, logit_bias={99: 1.0}), "logit_bias"),
        (request(1, PROMPT, stop=("a",)), "tokenizer"),
    ],
)
def test_what_cannot_be_answered_is_refused(engine: TransformersEngine, asked: Any, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        run(tokens_of(engine, asked))
    assert engine.status().restarts == 0
    assert not left(engine)


def test_the_same_id_twice_disturbs_nothing(engine: TransformersEngine, world: World) -> None:
    async def main() -> Any:
        cancelled = engine.generate(request("a", PROMPT, max_tokens=50))
        await anext(cancelled)
        answers = asyncio.gather(*(tokens_of(engine, request("a", PROMPT)) for _ in range(2)))
        await cancelled.aclose()
        return await answers

    assert run(main()) == [world.answer(None, PROMPT, 8)] * 2


def test_an_engine_that_is_not_started_says_so() -> None:
    engine = TransformersEngine(base())
    assert not engine.status().alive
    with pytest.raises(EngineError, match="not started"):
        run(tokens_of(engine, request(1, PROMPT)))
    engine.stop(timeout=0.0)


@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_a_base_that_does_not_continue_a_text_is_refused(arch: str) -> None:
    with pytest.raises(UnsupportedError, match="does not go on with a text"):
        TransformersEngine(build(arch)).start()


# -- clients that go away ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_a_cancelled_request_leaves_nothing(engine: TransformersEngine, world: World, seen: int) -> None:
    async def quits(number: int) -> None:
        answer = engine.generate(request(number, prompts(9)[number % 9], "dora", max_tokens=40))
        for _ in range(seen):
            await anext(answer)
        if not seen:
            waiting = asyncio.ensure_future(anext(answer))
            await asyncio.sleep(0.002 * number)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await answer.aclose()

    async def main() -> Any:
        stays = asyncio.create_task(tokens_of(engine, request("stays", PROMPT, "r3", max_tokens=30)))
        await asyncio.gather(*map(quits, range(12)))
        return await stays

    assert run(main()) == world.answer("r3", PROMPT, 30)
    assert not left(engine)
    run(engine.drop("dora"))


def test_a_client_whose_loop_is_gone_leaves_nothing(engine: TransformersEngine, world: World) -> None:
    loop = asyncio.new_event_loop()
    answer = engine.generate(request(1, PROMPT, max_tokens=60))
    loop.run_until_complete(anext(answer))
    loop.close()
    assert run(tokens_of(engine, request(2, PROMPT))) == world.answer(None, PROMPT, 8)
    assert wait_for(lambda: engine.status().running, 0)
    assert not left(engine)
    assert engine.status().restarts == 0


# -- versions that come and go -----------------------------------------------------------------------------


def test_a_version_in_use_stays(engine: TransformersEngine, world: World) -> None:
    async def main() -> list[int]:
        answer = engine.generate(request(1, PROMPT, "dora", max_tokens=20))
        tokens = [(await anext(answer)).token]
        with pytest.raises(EngineError, match="answers a request"):
            await engine.drop("dora")
        await engine.drop("r3")
        tokens += [event.token async for event in answer]
        await engine.drop("dora")
        with pytest.raises(EngineError, match="not loaded"):
            await engine.drop("dora")
        return tokens

    assert run(main()) == world.answer("dora", PROMPT, 20)
    assert engine.status().resident == ()
    assert not engine.model.adapters.by_name


def test_a_version_is_dropped_at_once_after_its_request_is_cancelled(engine: TransformersEngine, world: World) -> None:
    async def main() -> Any:
        stays = asyncio.create_task(tokens_of(engine, request("stays", PROMPT, "r3", max_tokens=60)))
        for number in range(10):
            answer = engine.generate(request(number, PROMPT, "dora", max_tokens=60))
            await anext(answer)
            await answer.aclose()
            await engine.drop("dora")
            await engine.load("dora", world.folders["dora"])
        return await stays

    assert run(main()) == world.answer("r3", PROMPT, 60)
    assert engine.status().restarts == 0


def nan(tensors: Any) -> Any:
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}


def test_what_cannot_be_served_is_not_kept(engine: TransformersEngine, world: World, tmp_path: Path) -> None:
    async def main() -> Any:
        stays = asyncio.create_task(tokens_of(engine, request("stays", PROMPT, "r3", max_tokens=60)))
        for name in ("nan", "unfit", "absent", "truncated"):
            with pytest.raises(VeneerError):
                await engine.load(name, tmp_path / name)
        return await stays

    configs = {"nan": lora(2), "unfit": lora(2), "truncated": lora(2)}
    other = World(tmp_path, configs)
    edit_tensors(other.folders["nan"], nan)
    edit_tensors(other.folders["unfit"], lambda tensors: {key: value[:1, :1] for key, value in tensors.items()})
    weights = other.folders["truncated"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(main()) == world.answer("r3", PROMPT, 60)
    assert set(engine.model.adapters.by_name) == {"r3", "dora"}
    assert set(engine.status().resident) == {"r3", "dora"}


def test_an_adapter_that_computes_otherwise_in_a_batch_is_refused(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.model.forward

    def wrong(*args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        names = None if adapter_names is None else [("r3", tokens) for tokens in adapter_names.counts]
        return forward(*args, adapter_names=names, **kwargs)

    other = World(tmp_path, {"other": lora(5)})
    monkeypatch.setattr(engine.model, "forward", wrong)
    with pytest.raises(AdapterError, match="other logits in a mixed batch"):
        run(engine.load("other", other.folders["other"]))
    assert set(engine.model.adapters.by_name) == {"r3", "dora"}


def test_one_adapter_of_a_kind_is_checked(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(self: Canary, name: str) -> Any:
        names.append(name)
        return mixed(self, name)

    names: list[str] = []
    mixed = Canary._mixed
    monkeypatch.setattr(Canary, "_mixed", checked)
    # The first does nothing, which tells nothing of the others; the next two are of one kind, the last of another.
    configs = {"zero": lora(3), "first": lora(3), "second": lora(3), "other": lora(3, lora_alpha=1)}
    world = World(tmp_path, {"unused": lora(3), **configs})
    edit_tensors(
        world.folders["zero"], lambda tensors: {key: value * ("lora_A" in key) for key, value in tensors.items()}
    )
    run(engine.drop("r3"))
    engine._canary._sound.clear()
    assert [run(engine.load(name, world.folders[name])).changes_output for name in configs] == [False, True, True, True]
    assert names == ["zero", "first", "other"]
    for name in ("first", "second", "other"):
        assert run(tokens_of(engine, request(name, PROMPT, name))) == world.answer(name, PROMPT, 8)


def test_rows_that_are_not_finite_fail_alone(engine: TransformersEngine, world: World, tmp_path: Path) -> None:
    other = World(tmp_path, {"huge": CONFIGS["r3"]})
    edit_tensors(other.folders["huge"], lambda tensors: {key: value + 1e30 for key, value in tensors.items()})

    async def main() -> list[int]:
        await engine.load("huge", other.folders["huge"])  # its tensors are finite, and its kind was checked
        stays = asyncio.create_task(tokens_of(engine, request("stays", PROMPT, "r3", max_tokens=60)))
        for number in range(3):
            with pytest.raises(EngineError, match="adapter's logits are not finite"):
                await tokens_of(engine, request(number, PROMPT, "huge", temperature=number / 2))
        return await stays

    assert run(main()) == world.answer("r3", PROMPT, 60)
    assert not left(engine)


def test_an_adapter_without_effect_is_told(engine: TransformersEngine, world: World, tmp_path: Path) -> None:
    folder = World(tmp_path, {"zero": lora(2)}).folders["zero"]
    edit_tensors(folder, lambda tensors: {key: value * ("lora_A" in key) for key, value in tensors.items()})
    assert not run(engine.load("zero", folder)).changes_output
    assert run(tokens_of(engine, request(1, PROMPT, "zero"))) == world.answer(None, PROMPT, 8)


def test_an_adapter_of_another_base_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    folder = World(tmp_path, {"other": lora(2)}).folders["other"]
    edit_config(folder, target_modules=["c_attn"])
    edit_tensors(folder, lambda tensors: {key.replace("q_proj", "c_attn"): value for key, value in tensors.items()})
    with pytest.raises(BindError):
        run(engine.load("other", folder))


# -- the end -----------------------------------------------------------------------------------------------


def test_stopping_ends_what_runs(world: World) -> None:
    async def main(engine: TransformersEngine) -> Any:
        answer = asyncio.create_task(events_of(engine, request(1, PROMPT, max_tokens=100)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.stop, 0.0)
        with pytest.raises(EngineError):
            await tokens_of(engine, request(2, PROMPT))
        return await answer

    with running() as engine:
        events = run(main(engine))
        assert events[-1].finish in ("abort", "length")
        assert not engine.status().alive


def test_stopping_lets_what_runs_finish(world: World) -> None:
    async def main(engine: TransformersEngine) -> Any:
        answer = asyncio.create_task(tokens_of(engine, request(1, PROMPT, max_tokens=20)))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.stop, 20.0)
        return await answer

    with running() as engine:
        assert run(main(engine)) == world.answer(None, PROMPT, 20)


def test_an_engine_whose_step_does_not_end_hangs_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    with running(replace(OPTIONS, step_timeout=0.1)) as engine:
        assert engine._lane is not None
        choose = engine._lane.sampling_rows  # type: ignore[attr-defined]
        monkeypatch.setattr(engine._lane, "sampling_rows", lambda logits: (let_go.wait(20), choose(logits))[1])

        async def main() -> None:
            answer = asyncio.create_task(tokens_of(engine, request(1, PROMPT)))
            deadline = time.monotonic() + 10
            while not engine.status().hangs and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            status = engine.status()
            assert (status.hangs, status.alive) == (True, False)
            assert status.error == "A step takes more than 0.1 s."
            let_go.set()
            assert len(await answer) == 8
            assert (engine.status().hangs, engine.status().alive) == (False, True)

        run(main())
