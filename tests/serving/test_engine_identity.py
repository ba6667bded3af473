"""Clients, loads, drops and cancellations at random: each answer is ``generate``'s under the version asked for."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from tests.serving.engine_world import CONFIGS, OPTIONS, World, prompts, request, run, running
from veneer.errors import EngineError
from veneer.serving import engine as engine_module

PROMPTS = prompts(20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("continuous", [True, False])
def test_no_answer_is_wrong(world: World, continuous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(continuous)
    counts = dict.fromkeys(("right", "wrong", "cancelled", "refused", "loaded", "dropped", "in use"), 0)

    async def ask(number: int) -> None:
        version, prompt = chance.choice([None, *CONFIGS]), chance.choice(PROMPTS)
        asked = request(number, prompt, version, max_tokens=chance.randint(1, 12))
        quits = chance.randint(0, 12) if chance.random() < 0.25 else None
        answer, tokens = engine.generate(asked), []
        try:
            async for event in answer:
                tokens.append(event.token)
                if len(tokens) == quits:
                    break
        except EngineError as error:
            counts["refused" if f"{version} is not loaded" in str(error) else "wrong"] += 1
            return
        await answer.aclose()
        expected = world.answer(version, prompt, asked.sampling.max_tokens)
        ended = len(tokens) == len(expected)
        counts["wrong" if tokens != expected[: len(tokens)] else "right" if ended else "cancelled"] += 1

    async def client(first: int) -> None:
        for number in range(12):
            await ask(100 * first + number)

    async def change() -> None:
        while True:
            version = chance.choice(list(CONFIGS))
            try:
                if version in engine.resident:
                    await engine.drop(version)
                    counts["dropped"] += 1
                else:
                    await engine.load(version, world.folders[version])
                    counts["loaded"] += 1
            except EngineError as error:
                counts["in use" if "answers a request" in str(error) else "wrong"] += 1
            await asyncio.sleep(0.01)

    async def main() -> None:
        for name in list(CONFIGS)[:5]:
            await engine.load(name, world.folders[name])
        changes = asyncio.create_task(change())
        await asyncio.gather(*map(client, range(14)))
        if changes.done():
            changes.result()
        changes.cancel()

    if not continuous:
        monkeypatch.setattr(engine_module, "batches_continuously", lambda model: False)
    with running(replace(OPTIONS, slots=2, rank_buckets=(2, 8))) as engine:
        run(main())
        status = engine.status()
    # How many of each there are depends on how fast the machine is; only the first is of the engine.
    assert counts["wrong"] == 0
    assert counts["right"] > 20, counts
    assert all(counts[name] for name in ("cancelled", "refused", "loaded", "dropped")), counts
    assert (status.restarts, status.running, status.waiting) == (0, 0, 0)


def test_versions_that_come_and_go_leave_nothing(world: World) -> None:
    async def main() -> None:
        for _ in range(20):
            for name in ("r3", "dora", "ia3"):
                await engine.load(name, world.folders[name])
            for name in ("r3", "dora", "ia3"):
                await engine.drop(name)

    with running() as engine:
        run(main())
        adapters = engine.model.adapters
        assert not adapters.by_name
        assert not [layer for layer in adapters.adapted_layers if layer.here(("r3", "dora", "ia3"))]
