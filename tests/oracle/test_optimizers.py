"""LoRA+ groups parameters as peft does."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import veneer
from tests.models import build

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
