"""Many callers at once, each with adapters of its own, get what each alone gets."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import veneer
from tests.models import inputs
from tests.random_adapters import adapted, config, enlarge

PROMPT: Any = inputs("llama")
NAMES = ["default", "b", "c", "__base__"]


def several() -> veneer.PeftModel:
    model = adapted("llama")
    for seed, name in enumerate(("b", "c"), start=5):
        model.add_adapter(name, config("llama", r=2 + seed))
        enlarge(model, name, seed)
    return model.eval()


def answer(model: veneer.PeftModel, name: str) -> Tensor:
    chosen = model.disable_adapter() if name == "__base__" else model.using(name)
    with chosen:
        return model.generate(**PROMPT, max_new_tokens=6, do_sample=False)


def test_threads_that_generate() -> None:
    model = several()
    alone = {name: answer(model, name) for name in NAMES}
    assert len({tuple(ids.flatten().tolist()) for ids in alone.values()}) == len(NAMES)
    wanted = NAMES * 6
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: answer(model, name), wanted))
    assert all(torch.equal(ids, alone[name]) for name, ids in zip(wanted, found, strict=True))


def test_a_mixed_batch_beside_threads_with_one_adapter() -> None:
    model = several()
    alone = {name: answer(model, name) for name in NAMES}
    rows = {key: value[:1].repeat(4, 1) for key, value in PROMPT.items()}
    mixed = model.generate(**rows, adapter_names=NAMES, max_new_tokens=6, do_sample=False)

    def ask(index: int) -> bool:
        if index % 2:
            own = model.generate(**rows, adapter_names=NAMES, max_new_tokens=6, do_sample=False)
            return torch.equal(own, mixed)
        name = NAMES[index // 2 % 4]
        return torch.equal(answer(model, name), alone[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_tasks_keep_their_choice_while_others_run() -> None:
    model = several()
    alone = {name: answer(model, name) for name in NAMES}

    async def ask(name: str) -> bool:
        chosen = model.disable_adapter() if name == "__base__" else model.using(name)
        with chosen:
            first = model.generate(**PROMPT, max_new_tokens=6, do_sample=False)
            await asyncio.sleep(0)
            again = await asyncio.to_thread(model.generate, **PROMPT, max_new_tokens=6, do_sample=False)
        return torch.equal(first, alone[name]) and torch.equal(again, alone[name])

    async def ask_all() -> list[bool]:
        return await asyncio.gather(*(ask(name) for name in NAMES * 3))

    assert all(asyncio.run(ask_all()))
