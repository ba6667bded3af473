"""Trainer's checkpoints: going on from one, and back to the best, without a library of adapters that it knows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, config, enlarge, saved

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(3, 75).reshape(8, 9)]

CONFIGS = {
    "lora": config(lora_dropout=0.0),
    "pissa": config(init_lora_weights="pissa"),
    "head": config(modules_to_save=["lm_head"]),
    "vera": veneer.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arguments = TrainingArguments(
            str(folder),
            **{"max_steps": 4, "save_steps": 2, "learning_rate": 3e-2, "report_to": [], **options},
            per_device_train_batch_size=4,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:2])  # type: ignore[arg-type]


def values(model: veneer.PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_the_best_adapter_is_back_after_training(kind: str, tmp_path: Path) -> None:
    model = veneer.get_peft_model(build("llama"), CONFIGS[kind], seed=1)
    seen: dict[int, dict[str, Tensor]] = {}
    # Of three steps the second is the best, as far as the metric goes.
    run = trainer(
        model,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    scores = iter([2.0, 1.0, 3.0])

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        seen[run.state.global_step] = values(model)
        metrics = {"eval_loss": next(scores)}
        run.control = run.callback_handler.on_evaluate(run.args, run.state, run.control, metrics)
        return metrics

    run.evaluate = evaluate  # type: ignore[method-assign]
    run.train()
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-2")
    assert same(values(model), seen[2])
    assert not same(values(model), seen[3])


@pytest.mark.parametrize("kind", ["pissa", "head", "vera"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not_cut(kind: str, tmp_path: Path) -> None:
    whole = veneer.get_peft_model(build("llama"), CONFIGS[kind], seed=1)
    trainer(whole, tmp_path).train()
    # Another random start, so that all has to come from the checkpoint.
    again = veneer.get_peft_model(build("llama"), CONFIGS[kind], seed=2)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(values(again), values(whole))


def test_several_adapters_are_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def pair(seed: int) -> veneer.PeftModel:
        model = veneer.get_peft_model(build("llama"), config(), seed=seed)
        model.add_adapter("other", config(r=2), seed=seed)
        enlarge(model, "other", seed)
        return model

    whole, again = pair(1), pair(2)
    trainer(whole, tmp_path).train()
    trainer(again, tmp_path).train(resume_from_checkpoint=True)
    for name in ("default", "other"):
        assert all(map(torch.equal, again.adapters.parameters(name), whole.adapters.parameters(name)))
    assert "missing keys" not in caplog.text


def test_a_checkpoint_holds_the_adapter_alone_and_loads_as_one(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "checkpoint-7")
    model.save_pretrained(tmp_path / "mine")
    own = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    assert own.keys() == {name for name in model.state_dict() if ".lora_" in name}
    assert not (tmp_path / "mine" / "model.safetensors").exists()
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "checkpoint-7")
    assert torch.equal(logits(again, inputs("llama")), logits(model, inputs("llama")))
    assert veneer.inspect(tmp_path / "checkpoint-7").kind == "adapter"


def test_a_state_of_adapters_alone_misses_nothing_of_the_base() -> None:
    model = adapted()
    state = {name: tensor for name, tensor in adapted(seed=3).state_dict().items() if ".lora_" in name}
    left = state.popitem()[0]
    found = model.load_state_dict(state, strict=False)
    assert (list(found.missing_keys), list(found.unexpected_keys)) == ([left], [])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    whole = model.state_dict()
    gone = next(name for name in whole if ".lora_" not in name)
    del whole[gone]
    assert model.load_state_dict(whole, strict=False).missing_keys == [gone]


# -- an adapter in the place of another --------------------------------------------------------------------


def test_an_adapter_of_the_same_shapes_takes_the_others_tensors(tmp_path: Path) -> None:
    model, batch = adapted(lora_alpha=4), inputs("llama")
    other = saved(tmp_path, seed=2, lora_alpha=9)
    expected = logits(adapted(seed=2, lora_alpha=9), batch)
    before = model.adapters.parameters("default")
    logits(model, batch)
    report = model.load_adapter(other, "default")
    assert report.name == "default"
    assert [id(p) for p in model.adapters.parameters("default")] == [id(p) for p in before]
    assert all(p.requires_grad for p in before)
    assert torch.equal(logits(model, batch), expected)
    assert model.peft_config["default"].lora_alpha == 9  # type: ignore[attr-defined]
    assert (model.active_adapters, list(model.peft_config)) == (["default"], ["default"])
    assert model.load_report is not None
    assert [a.name for a in model.load_report.adapters] == ["default"]


@pytest.mark.parametrize("kind", ["rank", "method", "head", "prompt"])
def test_one_of_other_shapes_takes_the_others_place(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": {"r": 2}, "head": {"modules_to_save": ["lm_head"]}}
    batch = inputs("llama")
    if kind in options:
        single = adapted(**options[kind])
    else:
        own = CONFIGS["vera"] if kind == "method" else CONFIGS["prompt"]
        single = veneer.get_peft_model(build("llama"), own, seed=1).eval()
        enlarge(single, "default")
    single.save_pretrained(tmp_path)
    model = adapted(seed=2)
    model.add_adapter("second", config(r=3), seed=4)
    second = logits(model, batch, adapter_names=["second"] * 2)
    model.load_adapter(tmp_path, "default")
    assert gap(logits(model, batch), logits(single, batch)) < 1e-6
    assert (list(model.peft_config), model.active_adapters) == (["default", "second"], ["default"])
    model.set_adapter("second")
    assert gap(logits(model, batch), second) < 1e-6


def test_what_cannot_be_loaded_leaves_the_old_one(tmp_path: Path) -> None:
    model, batch = adapted(), inputs("llama")
    expected = logits(model, batch)
    other = adapted(seed=2)
    with torch.no_grad():
        next(iter(other.adapters.parameters("default"))).fill_(float("nan"))
    other.save_pretrained(tmp_path)
    with pytest.raises(veneer.NonFiniteError):
        model.load_adapter(tmp_path, "default")
    adapted("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(veneer.BindError):
        model.load_adapter(tmp_path / "gpt2", "default")
    assert torch.equal(logits(model, batch), expected)
    assert list(model.peft_config) == ["default"]


def test_one_that_cannot_be_active_beside_the_others_is_not_taken(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", modules_to_save=["lm_head"])
    model: Any = veneer.PeftModel.from_pretrained(build("llama"), whole)
    model.load_adapter(saved(tmp_path / "plain"), "plain")
    model.set_adapter(["default", "plain"])
    expected = logits(model, inputs("llama"))
    with pytest.raises(veneer.AdapterError, match="both bring lm_head whole"):
        model.load_adapter(whole, "plain")
    assert (list(model.peft_config), model.active_adapters) == (["default", "plain"], ["default", "plain"])
    assert torch.equal(logits(model, inputs("llama")), expected)


def test_a_merged_one_is_replaced_with_the_base_as_it_was(tmp_path: Path) -> None:
    model, batch = adapted(), inputs("llama")
    model.merge_adapter()
    model.load_adapter(saved(tmp_path, seed=2), "default")
    assert gap(logits(model, batch), logits(adapted(seed=2), batch)) < 1e-5
    plain = model.unload()
    assert torch.equal(logits(plain, batch), logits(build("llama"), batch))
