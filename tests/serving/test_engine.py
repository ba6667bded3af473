"""The engine answers as ``generate`` does under each request's adapter, whatever else is in the batch."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serving.engine_world import CONFIGS, OPTIONS, World, base, prompts, request, run, running, tokens_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("adapters"))


def test_mixed_requests_get_the_answers_of_their_adapters(world: World) -> None:
    asked = [
        request(number, prompt, [None, *CONFIGS][number % (len(CONFIGS) + 1)])
        for number, prompt in enumerate(prompts(24))
    ]

    async def main() -> list[list[int]]:
        for name, folder in world.folders.items():
            assert (await engine.load(name, folder)).changes_output
        return await asyncio.gather(*(tokens_of(engine, one) for one in asked))

    with running() as engine:
        answers = run(main())
        status = engine.status()
    assert answers == [world.answer(one.version, one.prompt, 8) for one in asked]
    assert len({tuple(answer) for answer in answers}) > 20
    assert (status.alive, status.running, status.waiting, status.slots_used) == (True, 0, 0, 0)
    assert set(status.resident) == set(CONFIGS)


def test_half_precision_passes_the_check_of_each_version(world: World) -> None:
    async def main() -> list[int]:
        for name, folder in world.folders.items():
            assert (await engine.load(name, folder)).changes_output
        return [len(await tokens_of(engine, request(name, prompts(1)[0], name))) for name in world.folders]

    with running(model=base().bfloat16()) as engine:
        assert run(main()) == [8] * len(CONFIGS)


def test_a_version_tells_its_memory_and_its_slots(world: World) -> None:
    async def main() -> dict[str, tuple[int, int]]:
        versions = {name: await engine.load(name, world.folders[name]) for name in ("r8", "r16", "ia3", "r3")}
        for name, version in versions.items():
            tensors = dict(engine.model.adapters.get(name).named_tensors())
            assert version.nbytes >= sum(tensor.nbytes for tensor in tensors.values()) > 0
        return {name: (version.bucket, version.slots) for name, version in versions.items()}

    with running(replace(OPTIONS, slots=4, rank_buckets=(4, 8))) as engine:
        assert run(main()) == {"r8": (8, 1), "r16": (8, 2), "ia3": (0, 1), "r3": (4, 1)}
        assert engine.status().bank_bytes > 0


def test_versions_that_come_and_go_let_the_others_lie_in_their_slots(world: World) -> None:
    async def main() -> None:
        await engine.load("r1", world.folders["r1"])
        assert engine._lane is not None
        bank = engine._lane.bank
        with bank.lease("r1"):
            for number, name in enumerate((name for name in CONFIGS if name != "r1"), 2):
                await engine.load(name, world.folders[name])
                with bank.lease(name):
                    await tokens_of(engine, request(name, prompts(1)[0], "r1", max_tokens=2))
                await engine.drop(name)
                bank.lease("r1").release()
                assert bank.status().writes == number, name

    with running() as engine:
        run(main())


def test_the_folders_are_there(world: World) -> None:
    assert all(
        isinstance(folder, Path) and (folder / "adapter_config.json").is_file() for folder in world.folders.values()
    )
