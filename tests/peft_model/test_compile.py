"""A loaded model under ``torch.compile``: one graph, and a switch between adapters compiles nothing anew."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import veneer
from tests.models import gap, inputs, logits
from tests.random_adapters import adapted, config, enlarge

X = inputs("llama")
CLOSE = 1e-5
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def two() -> veneer.PeftModel:
    model = adapted("llama")
    model.add_adapter("other", config("llama", r=2, use_dora=True))
    enlarge(model, "other", 5)
    return model.eval().requires_grad_(False)


def compiled(model: veneer.PeftModel) -> tuple[Any, CompileCounter]:
    """The model in one graph, and how often it was compiled."""
    counter = CompileCounter()
    return torch.compile(model, fullgraph=True, backend=counter), counter


def test_one_graph_for_each_selection_and_none_for_a_switch_back() -> None:
    model = two()
    graph, counter = compiled(model)
    selections: list[list[str]] = [["default"], ["other"], ["default", "other"]]
    seen: list[Tensor] = []
    for names in selections:
        model.set_adapter(names)
        seen.append(logits(graph, X))
        assert gap(seen[-1], logits(model, X)) < CLOSE
    count = counter.frame_count
    assert count == len(selections)
    for names, expected in zip(selections, seen, strict=True):
        model.set_adapter(names)
        assert torch.equal(logits(graph, X), expected)
    assert counter.frame_count == count


def test_a_choice_for_a_call_reaches_compiled_code() -> None:
    model = two()
    graph, counter = compiled(model)
    usual = logits(graph, X)
    with model.using("other"):
        assert gap(logits(graph, X), logits(model, X)) < CLOSE
        assert gap(logits(graph, X), usual) > 0.02
    with model.disable_adapter():
        assert torch.equal(logits(graph, X), logits(model, X))
    rows = ["other", "__base__"]
    assert gap(logits(graph, X, adapter_names=rows), logits(model, X, adapter_names=rows)) < CLOSE
    count = counter.frame_count
    assert torch.equal(logits(graph, X), usual)
    assert counter.frame_count == count


def test_the_plan_of_a_bank_reaches_compiled_code() -> None:
    model = two()
    for name in ("default", "other"):
        model.set_requires_grad(name, False)
    graph, _ = compiled(model)
    bank = model.bank(slots=4)
    plan = bank.plan([bank.lease("other"), bank.lease("default")])
    expected = logits(model, X, adapter_names=["other", "default"])
    assert gap(logits(model, X, adapter_names=plan), expected) < CLOSE
    assert gap(logits(graph, X, adapter_names=plan), expected) < CLOSE


def test_threads_choose_for_themselves_in_compiled_code() -> None:
    model = two()
    graph, _ = compiled(model)
    expected = {}
    for name in ("default", "other"):
        with model.using(name):
            expected[name] = logits(graph, X)
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(20):
            with model.using(name):
                if not torch.equal(logits(graph, X), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_compiles() -> None:
    model = adapted("llama").train()
    graph, _ = compiled(model)
    graph(**X).logits.square().mean().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**X).logits.square().mean().backward()
    assert own
    for name, parameter in model.named_parameters():
        if name in own:
            assert parameter.grad is not None
            assert gap(own[name], parameter.grad) < 1e-4, name
