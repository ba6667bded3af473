"""A call of the model ends as it began, whatever other threads or its own hooks do to the adapters meanwhile."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import veneer
from tests.models import gap, inputs, logits
from tests.random_adapters import adapted, config, enlarge, saved
from veneer.errors import AdapterError, UnknownAdapterError

X: Any = inputs("llama")
CLOSE = 1e-5
SOON = 10.0

Change = Callable[[veneer.PeftModel], Any]


def two() -> veneer.PeftModel:
    """A model with the adapters "default", which is active, and "b"."""
    model = adapted("llama")
    model.add_adapter("b", config("llama", r=3))
    enlarge(model, "b", 5)
    for name in ("default", "b"):
        model.set_requires_grad(name, False)
    return model.eval()


def under(model: veneer.PeftModel, name: str | None) -> Tensor:
    with model.using(name) if name else model.disable_adapter():
        return logits(model, X)


@contextmanager
def midway(model: veneer.PeftModel, act: Callable[[], Any]) -> Iterator[list[Any]]:
    """In each call, act between the first block and the second; what comes of it is listed."""
    done: list[Any] = []

    def hook(*_: Any) -> None:
        try:
            done.append(act())
        except AdapterError as error:
            done.append(error)

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(hook)
    try:
        yield done
    finally:
        handle.remove()


class Paused:
    """A call in another thread, which stops between the first block and the second until it is let go."""

    def __init__(self, model: veneer.PeftModel, name: str, inside: Callable[[], Any] = lambda: None) -> None:
        self.model, self.name, self.inside = model, name, inside
        self.there, self.go = threading.Event(), threading.Event()
        self.pool = ThreadPoolExecutor(4)

    def __enter__(self) -> Paused:
        self.hook = self.model.get_base_model().model.layers[1].register_forward_pre_hook(self._stop)
        self.answer = self.pool.submit(self._ask)
        assert self.there.wait(SOON)
        return self

    def _ask(self) -> Tensor:
        threading.current_thread().name = "paused"
        return under(self.model, self.name)

    def _stop(self, *_: Any) -> None:
        if threading.current_thread().name == "paused" and not self.there.is_set():
            self.there.set()
            assert self.go.wait(SOON)
            self.inside()

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.hook.remove()
        self.pool.shutdown()

    def wait_for_change(self) -> None:
        """Wait until a change waits for the call."""
        until = time.monotonic() + SOON
        while not self.model.adapters.active_selection.underway._waiting:
            assert time.monotonic() < until
            time.sleep(0.001)


# -- choosing ------------------------------------------------------------------------------------------------------


def choices() -> dict[str, Change]:
    return {
        "set_adapter": lambda model: model.set_adapter("b"),
        "set_adapter to both": lambda model: model.set_adapter(["b", "default"]),
        "disable_adapters": lambda model: model.disable_adapters(),
    }


@pytest.mark.parametrize("choice", choices())
@pytest.mark.parametrize("by", ["model", "base_model", "task_ids"])
def test_a_choice_made_inside_a_call_holds_from_the_next_one_on(choice: str, by: str) -> None:
    model = two()
    expected = under(model, "default")
    call: Any = model.base_model if by == "base_model" else model
    more = {"task_ids": torch.zeros(2, dtype=torch.long)} if by == "task_ids" else {}
    with midway(model, lambda: choices()[choice](model)):
        assert torch.equal(call(**X, **more).logits, expected)
    assert gap(logits(model, X), expected) > 0.01


class Act(LogitsProcessor):
    """Does something in each step of generation."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.act()
        return scores


def generated(model: veneer.PeftModel, act: Callable[[], Any] = lambda: None) -> Tensor:
    processors = LogitsProcessorList([Act(act)])
    return model.generate(**X, max_new_tokens=5, do_sample=False, logits_processor=processors)


def test_generation_ends_with_the_adapter_that_it_began_with() -> None:
    model = two()
    expected = generated(model)
    assert torch.equal(generated(model, lambda: model.set_adapter("b")), expected)
    assert not torch.equal(generated(model), expected)


# -- changes inside the call that they would disturb -----------------------------------------------------------------


def changes(folder: Path) -> dict[str, Change]:
    return {
        "delete": lambda model: model.delete_adapter("default"),
        "rename": lambda model: model.rename_adapter("default", "other"),
        "merge": lambda model: model.merge_adapter(["b"]),
        "merge_and_unload": lambda model: model.merge_and_unload(),
        "unmerge": lambda model: model.unmerge_adapter(),
        "unload": lambda model: model.unload(),
        "hotswap": lambda model: veneer.hotswap_adapter(model, folder, adapter_name="default"),
        "prepare": lambda model: veneer.prepare_model_for_compiled_hotswap(model),
        "move": lambda model: model.double(),
        "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("threads") / "c", seed=9)


@pytest.mark.parametrize("change", changes(Path()))
def test_a_change_inside_a_call_that_it_disturbs_is_an_error_and_no_change(change: str, folder: Path) -> None:
    model = two()
    expected = under(model, "default")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with midway(model, lambda: changes(folder)[change](model)) as done:
        assert torch.equal(logits(model, X), expected)
    assert len(done) == 1
    assert isinstance(done[0], AdapterError)
    assert "inside a call" in done[0].message
    assert "after the call" in done[0].hint
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, X), expected)
    changes(folder)[change](model)  # and outside it works


def test_a_change_of_another_adapter_inside_a_call(folder: Path) -> None:
    model = two()
    expected = under(model, "default")

    def act() -> None:
        model.delete_adapter("b")
        model.load_adapter(folder, "b")
        model.rename_adapter("b", "c")
        veneer.hotswap_adapter(model, folder, adapter_name="c")

    with midway(model, act) as done:
        assert torch.equal(logits(model, X), expected)
    assert done == [None]
    assert list(model.peft_config) == ["default", "c"]


def test_an_adapter_that_is_in_the_base_weights_concerns_every_call() -> None:
    model = two()
    model.merge_adapter(["b"])
    with midway(model, lambda: model.delete_adapter("b")) as done, model.using("default"):
        logits(model, X)
    assert isinstance(done[0], AdapterError)


def test_an_adapter_that_was_chosen_and_is_gone_is_an_error() -> None:
    model = two()
    with model.using("b"):
        model.rename_adapter("b", "c")
        with pytest.raises(UnknownAdapterError, match="'b'"):
            logits(model, X)
    assert not model.adapters.active_selection.underway._calls


# -- changes by other threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", changes(Path()))
def test_a_change_waits_for_the_calls_that_it_disturbs(change: str, folder: Path) -> None:
    model = two()
    expected = under(model, "default")
    with Paused(model, "default") as paused:
        made = paused.pool.submit(changes(folder)[change], model)
        paused.wait_for_change()
        assert not made.done()
        paused.go.set()
        assert torch.equal(paused.answer.result(SOON), expected)
        made.result(SOON)


def test_a_change_does_not_wait_for_calls_of_other_adapters(folder: Path) -> None:
    model = two()
    expected = under(model, "default")
    with Paused(model, "default") as paused:
        model.delete_adapter("b")
        model.load_adapter(folder, "c")
        under(model, "c")
        assert not paused.answer.done()
        paused.go.set()
        assert torch.equal(paused.answer.result(SOON), expected)


def test_a_change_that_waits_goes_before_later_calls_and_not_before_inner_ones() -> None:
    model = two()
    expected = {name: under(model, name) for name in ("default", "b")}
    inner: list[Tensor] = []
    with Paused(model, "default", lambda: inner.append(under(model, "b"))) as paused:
        made = paused.pool.submit(model.merge_adapter, ["b"])
        paused.wait_for_change()
        later = paused.pool.submit(under, model, "b")
        time.sleep(0.05)
        assert not later.done()
        paused.go.set()
        made.result(SOON)
        assert torch.equal(paused.answer.result(SOON), expected["default"])
        assert torch.equal(inner[0], expected["b"])
        assert gap(later.result(SOON), expected["b"]) < CLOSE
        assert model.adapters.layers[next(iter(model.adapters.layers))].merged == ("b",)


def test_a_call_that_waited_takes_what_is_chosen_then() -> None:
    model = two()
    model.set_adapter("default")
    expected = under(model, "default")
    with Paused(model, "default") as paused:
        made = paused.pool.submit(model.rename_adapter, "default", "new")
        paused.wait_for_change()
        later = paused.pool.submit(logits, model, X)
        paused.go.set()
        made.result(SOON)
        assert torch.equal(later.result(SOON), expected)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_has_ended(kind: type[BaseException]) -> None:
    model = two()

    def fail() -> None:
        raise kind

    with midway(model, fail), pytest.raises(kind):
        logits(model, X)
    assert model.adapters.active_selection.calls() == []
    model.merge_adapter()
    model.delete_adapter("default")


def test_a_change_that_fails_has_ended() -> None:
    model = two()
    with pytest.raises(UnknownAdapterError):
        model.delete_adapter("nobody")
    with pytest.raises(veneer.DuplicateAdapterError):
        model.rename_adapter("default", "b")
    under(model, "b")
    model.delete_adapter("b")


def test_a_thread_that_outlives_the_call_whose_context_it_has() -> None:
    model = two()
    contexts: list[contextvars.Context] = []
    with midway(model, lambda: contexts.append(contextvars.copy_context())):
        logits(model, X)
    expected = under(model, "b")

    def act() -> Tensor:
        found = under(model, "b")
        model.delete_adapter("default")
        model.merge_adapter(["b"])
        return found

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(contexts[0].run, act).result(SOON), expected)


def test_a_thread_in_the_context_of_a_call_that_goes_on_does_not_wait_for_it() -> None:
    model = two()
    pool = ThreadPoolExecutor(1)

    def ask_other() -> None:
        if len(model.adapters.active_selection.calls()) > 1:
            return
        context = contextvars.copy_context()
        pool.submit(context.run, under, model, "b").result(SOON)
        pool.submit(context.run, model.delete_adapter, "default").result(SOON)

    with pool, midway(model, ask_other) as done:
        logits(model, X)
    assert [type(outcome) for outcome in done] == [type(None), AdapterError]


def test_tasks_that_take_turns_in_a_thread() -> None:
    model = two()
    expected = {name: under(model, name) for name in ("default", "b")}

    async def ask(name: str) -> None:
        for _ in range(3):
            with model.using(name):
                await asyncio.sleep(0)
                assert gap(logits(model, X), expected[name]) < CLOSE

    async def change() -> None:
        for _ in range(3):
            model.merge_adapter(["b"])
            await asyncio.sleep(0)
            model.unmerge_adapter()

    async def everything() -> None:
        await asyncio.gather(ask("default"), change(), ask("b"))

    asyncio.run(everything())


def test_sixteen_threads(folder: Path) -> None:
    model = two()
    model.set_adapter("default")
    model.load_adapter(folder, "c")
    alone = {name: under(model, name) for name in ("default", "b", "c")}
    alone["both"] = under(model, ["default", "b"])  # type: ignore[arg-type]
    stop = threading.Event()

    def any_of(found: Tensor, names: tuple[str, ...]) -> bool:
        return any(gap(found, alone[name]) < 1e-4 for name in names)

    def ask(seed: int) -> bool:
        draw = random.Random(seed)
        while not stop.is_set():
            name = draw.choice(["default", "b"])
            if not any_of(under(model, name), (name,)):
                return False
            if not any_of(logits(model, X), ("default", "b", "both")):
                return False
            rows = logits(model, X, adapter_names=["default", "b"])
            if gap(rows[0], alone["default"][0]) > 1e-4 or gap(rows[1], alone["b"][1]) > 1e-4:
                return False
        return True

    def churn(number: int) -> bool:
        name = f"c{number}"
        for _ in range(3):
            model.load_adapter(folder, name)
            if not any_of(under(model, name), ("c",)):
                return False
            model.rename_adapter(name, f"{name}-new")
            model.delete_adapter(f"{name}-new")
        return True

    def switch() -> bool:
        for _ in range(5):
            for names in ("b", ["default", "b"], "default"):
                model.set_adapter(names)
        return True

    def merge() -> bool:
        for _ in range(3):
            model.merge_adapter(["b"])
            model.unmerge_adapter()
            model.set_adapter("default")
        return True

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, seed) for seed in range(10)]
        made = [pool.submit(churn, number) for number in range(4)] + [pool.submit(switch), pool.submit(merge)]
        assert all(one.result(60) for one in made)
        stop.set()
        assert all(one.result(60) for one in asked)
    assert list(model.peft_config) == ["default", "b", "c"]
    assert torch.equal(under(model, "c"), alone["c"])


# -- threads that a call starts --------------------------------------------------------------------------------------


def test_continuous_batching_gives_each_prompt_its_adapter() -> None:
    model = two()
    prompts = [X["input_ids"][0].tolist(), X["input_ids"][0].tolist()[:4]] * 2
    plain = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=98, pad_token_id=0)
    small = {"generation_config": plain, "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16)}

    def expect(prompt: list[int], name: str) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain, adapter_names=[name]
        )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    names = ["b", "__base__", "default", "b"]
    outputs = model.generate_batch(prompts, adapter_names=names, **small)
    assert list(outputs) == ["req_0", "req_1", "req_2", "req_3"]
    assert [answer.request_id for answer in outputs.values()] == list(outputs)
    expected = [expect(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    assert [answer.generated_tokens for answer in outputs.values()] == expected
    assert expected[0] != expect(prompts[0], "default")
    with model.disable_adapter():
        outputs = model.generate_batch(prompts[:1], adapter_names=["b"], **small)
    assert next(iter(outputs.values())).generated_tokens == expect(prompts[0], "__base__")


def test_continuous_batching_uses_what_its_caller_has_chosen() -> None:
    model = two()
    prompt = X["input_ids"][0].tolist()
    plain = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=98, pad_token_id=0)
    small = {"generation_config": plain, "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16)}

    def ask() -> list[int]:
        return next(answer.generated_tokens for answer in model.generate_batch([prompt], **small).values())

    def expect() -> list[int]:
        ids = X["input_ids"][:1]
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        return found[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    with midway(model, lambda: model.set_adapter("b")):
        assert ask() == expect_default(model, expect)
    with model.disable_adapter():
        assert ask() == expect()
    with model.using("b"), model.continuous_batching_context_manager(**small) as manager:
        manager.add_requests(inputs=[prompt], max_new_tokens=3)
        answer = None
        while answer is None or not answer.is_finished():
            answer = manager.get_result(timeout=SOON)
        assert answer.generated_tokens == expect()
    assert not model.adapters.active_selection.underway._calls


def expect_default(model: veneer.PeftModel, expect: Callable[[], list[int]]) -> list[int]:
    with model.using("default"):
        return expect()
