"""AdaLoRA's training takes the same ranks away as peft's, and both read what the other saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.methods.case import Case
from tests.methods.networks import NETWORKS
from tests.methods.test_contract import scrambled
from tests.models import gap
from veneer.errors import AdapterError, ConfigError

pytestmark = pytest.mark.oracle
STEPS = 8
OPTIONS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "total_step": STEPS,
    "lora_alpha": 16,
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "down_proj"],
}
LLAMA = NETWORKS["llama"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(model: Any) -> list[float]:
    batch = {**LLAMA.batch(), "labels": LLAMA.batch()["input_ids"]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def started(folder: Path) -> Any:
    """An AdaLoRA of peft's, saved before it is trained."""
    torch.manual_seed(0)
    model = peft.get_peft_model(LLAMA.make(), peft.AdaLoraConfig(**OPTIONS))
    scrambled(model, Case("", "llama", "AdaLoraConfig")).save_pretrained(folder)
    return model


def test_the_same_ranks_are_taken_away_as_in_peft(tmp_path: Path) -> None:
    theirs = started(tmp_path / "start")
    ours = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path / "start", is_trainable=True)
    assert train(ours) == pytest.approx(train(theirs), rel=1e-4)
    left = {k: t.flatten() != 0 for k, t in ours.state_dict().items() if "lora_E" in k}
    assert sum(int(kept.sum()) for kept in left.values()) == 2 * len(left)
    for key, kept in left.items():
        assert torch.equal(kept, theirs.state_dict()[key].flatten() != 0), key
    assert gap(LLAMA.read(ours), LLAMA.read(theirs)) < 1e-4


def test_each_reads_what_the_other_trained(tmp_path: Path) -> None:
    theirs = started(tmp_path / "start")
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path / "theirs")
    ranks = {len(t) for k, t in model.state_dict().items() if "lora_E" in k}
    assert len(ranks) > 1
    assert gap(LLAMA.read(model), LLAMA.read(theirs)) < 1e-5
    ours = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path / "start", is_trainable=True)
    train(ours)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(LLAMA.make(), tmp_path / "ours").eval()
    assert gap(LLAMA.read(again), LLAMA.read(ours)) < 1e-5


def test_without_an_adalora_to_train_it_says_so() -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="AdaLoRA"):
        model.update_and_allocate(1)
    with pytest.raises(ConfigError, match="total_step=4"):
        veneer.AdaLoraConfig(total_step=4, tfinal=4)
