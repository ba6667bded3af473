"""Training: gradients go where they should, under a plain loop and under transformers' Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

import veneer
from tests.models import CASES, VOCAB, build, gap, inputs, logits
from tests.random_adapters import bits, config, enlarge, same_bits


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Sixteen rows that can be learnt: each repeats one token."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.full((9,), 3 + index)
        return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, arch: str) -> torch.Tensor:
    batch = inputs(arch)
    output = model(**batch).logits
    targets = torch.arange(output.shape[:-1].numel()).remainder(output.shape[-1])
    return torch.nn.functional.cross_entropy(output.flatten(0, -2), targets)


@pytest.mark.parametrize("arch", CASES)
def test_gradients_reach_the_adapter_and_nothing_else(arch: str) -> None:
    model = veneer.get_peft_model(build(arch), config(arch), seed=1)
    own = {id(parameter) for parameter in model.adapters.parameters("default")}
    loss_of(model, arch).backward()
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None, name
            assert parameter.grad.count_nonzero(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_lower_the_loss_and_leave_the_base(dtype: torch.dtype) -> None:
    model = veneer.get_peft_model(build("llama").to(dtype), config(init_lora_weights=True), seed=1).train()
    assert {p.dtype for p in model.adapters.parameters("default")} == {torch.float32}
    before = {name: tensor for name, tensor in bits(model).items() if "lora_" not in name}
    optimizer = torch.optim.AdamW(model.adapters.parameters("default"), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = loss_of(model, "llama")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = {name: tensor for name, tensor in bits(model).items() if "lora_" not in name}
    assert same_bits(after, before)


def test_a_new_adapter_changes_nothing_yet() -> None:
    model = veneer.get_peft_model(build("llama"), config(init_lora_weights=True), seed=1).eval()
    assert torch.equal(logits(model, inputs("llama")), logits(build("llama"), inputs("llama")))
    down = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach()
    bound = (1 / 32) ** 0.5
    assert down.abs().max() <= bound
    assert down.std() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_the_gaussian_start() -> None:
    model = veneer.get_peft_model(build("llama"), config(r=8, init_lora_weights="gaussian"), seed=1)
    down = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach()
    assert down.std() == pytest.approx(1 / 8, rel=0.2)


def test_the_start_is_reproducible() -> None:
    tensors = [
        veneer.get_peft_model(build("llama"), config(), seed=seed).get_adapter_state_dict() for seed in (1, 1, 2)
    ]
    assert same_bits(tensors[0], tensors[1])
    assert not same_bits(tensors[0], tensors[2])


def test_dropout_acts_while_training_only() -> None:
    model = veneer.get_peft_model(build("llama"), config(lora_dropout=0.5), seed=1)
    enlarge(model, "default")
    batch = inputs("llama")
    model.eval()
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    torch.manual_seed(0)
    first = logits(model, batch)
    assert gap(logits(model, batch), first) > 1e-3
    torch.manual_seed(0)
    assert torch.equal(logits(model, batch), first)


def test_only_the_active_of_the_trainable_adapters_gets_gradients() -> None:
    model = veneer.get_peft_model(build("llama"), config(), seed=1)
    model.add_adapter("other", config(), seed=2)

    def wanted(name: str) -> set[bool]:
        return {parameter.requires_grad for parameter in model.adapters.parameters(name)}

    assert (wanted("default"), wanted("other")) == ({True}, {False})
    model.set_adapter("other")
    assert (wanted("default"), wanted("other")) == ({False}, {True})
    model.set_adapter(["default", "other"], inference_mode=True)
    assert (wanted("default"), wanted("other")) == ({False}, {False})
    model.set_requires_grad("default")
    assert (wanted("default"), wanted("other")) == ({True}, {False})


def test_an_adapter_for_inference_stays_frozen_until_asked(tmp_path: Path) -> None:
    veneer.get_peft_model(build("llama"), config(), seed=1).save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert model.get_nb_trainable_parameters()[0] == 0
    assert model.peft_config["default"].inference_mode is True
    trainable = veneer.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] > 0
    assert trainable.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_under_trainer_and_saves(tmp_path: Path, checkpointing: bool) -> None:
    from transformers import Trainer, TrainingArguments

    model = veneer.get_peft_model(build("llama"), config(init_lora_weights=True, lora_dropout=0.1), seed=1)
    before = bits(model)
    with warnings.catch_warnings():
        # transformers renames its own option between versions.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=10,
            save_steps=5,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.9 * float(losses[0])
    assert trainer.label_names == ["labels"]
    changed = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    for step in (5, 10):
        files = {p.name for p in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert all("lora_" in name for name in load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
    again = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "checkpoint-10")
    assert torch.equal(logits(again, inputs("llama")), logits(model.eval(), inputs("llama")))


def test_gradients_are_the_same_with_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model: Any = veneer.get_peft_model(build("llama"), config(), seed=1).train()
        enlarge(model, "default")
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = torch.arange(3, 11).repeat(2, 1).remainder(VOCAB)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.adapters.parameters("default")])
    assert all(gap(a, b) < 1e-5 for a, b in zip(*grads, strict=True))
