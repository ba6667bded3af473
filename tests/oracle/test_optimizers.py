"""LoRA+ groups parameters as peft does, and LoRA-FA takes its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

import veneer
from tests.models import build, inputs
from tests.oracle.peer import scramble

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["query"], "bias": "all", "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_the_groups_are_those_of_peft(options: dict[str, Any]) -> None:
    arch = "bert" if "query" in options["target_modules"] else "llama"
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    ours = veneer.get_peft_model(build(arch), veneer.LoraConfig(r=4, **options))
    theirs = peft.get_peft_model(build(arch), peft.LoraConfig(r=4, **options))
    mine = veneer.create_loraplus_optimizer(ours, torch.optim.AdamW, **rates)
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)

    def shape(optimizer: Any) -> list[Any]:
        return [
            (group["lr"], group["weight_decay"], sorted(tuple(p.shape) for p in group["params"]))
            for group in optimizer.param_groups
        ]

    assert shape(mine) == shape(other)
    assert sum(len(group["params"]) for group in mine.param_groups) == sum(p.requires_grad for p in ours.parameters())


def test_b_moves_further_than_a() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(r=4, init_lora_weights=False), seed=1)
    optimizer = veneer.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=8.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.allclose(before[name] - parameter, torch.tensor(8.0 if "lora_B" in name else 1.0), atol=1e-5)


def test_with_nothing_to_train_it_says_so() -> None:
    with pytest.raises(veneer.ConfigError, match="to be trained"):
        veneer.create_loraplus_optimizer(
            build("llama").requires_grad_(False), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ],
)
def test_the_steps_of_lora_fa_are_those_of_peft(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # peft's projection is in bfloat16 where it can be; here both are in float32.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    sizes = {"r": 4, "lora_alpha": 12}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **sizes, **options)
    theirs = scramble(peft.get_peft_model(build("llama"), config))
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    start = {key: tensor.detach().clone() for key, tensor in ours.adapters.named_tensors("default")}
    pairs = [
        (ours, veneer.create_lorafa_optimizer(ours, **sizes, lr=1e-2, weight_decay=0.1)),
        (theirs, create_lorafa_optimizer(theirs, **sizes, lr=1e-2, weight_decay=0.1)),
    ]
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
    for _ in range(3):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model.eval()(**batch).loss.backward()
            optimizer.step()
        expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        for key, tensor in ours.adapters.named_tensors("default"):
            assert torch.allclose(tensor, expected[key], atol=2e-5), key
            assert torch.equal(tensor, start[key]) is ("lora_A" in key)


def test_lora_fa_trains_an_embedding_whole_and_takes_a_closure() -> None:
    config = veneer.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = veneer.get_peft_model(build("llama"), config, seed=1)
    optimizer = veneer.create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}

    def closure() -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name and "lora_A" not in name}


@pytest.mark.parametrize("wrong", [{"r": 8}, {"lora_alpha": 3}, {"use_rslora": True}])
def test_lora_fa_is_told_what_the_adapter_is(wrong: dict[str, Any]) -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(r=4, lora_alpha=4))
    with pytest.raises(veneer.ConfigError, match=f"{next(iter(wrong))}=.* was passed to create_lorafa_optimizer"):
        veneer.create_lorafa_optimizer(model, **{"r": 4, "lora_alpha": 4, "lr": 1e-2, **wrong})


def test_lora_fa_without_a_linear_layer_says_so() -> None:
    model = veneer.get_peft_model(build("llama"), veneer.LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens"]))
    with pytest.raises(veneer.ConfigError, match="linear layer"):
        veneer.create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-2)
