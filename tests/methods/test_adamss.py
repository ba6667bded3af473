"""What AdaMSS works out from the base, and how its training chooses among its groups."""

from __future__ import annotations

import sys
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
from tests.methods.test_readings import edit, loaded, made
from tests.models import gap
from veneer.errors import BaseMismatchError, UnsupportedError

pytest.importorskip("sklearn")
pytestmark = pytest.mark.oracle
LLAMA = NETWORKS["llama"]
SIZES: dict[str, Any] = {"r": 10, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["q_proj", "down_proj"]}
# Of the 12 groups of 4 layers 7 go on after step 2, and 2 after step 4.
SCHEDULE: dict[str, Any] = {
    "use_asa": True,
    "asa_target_subspaces": 2,
    "init_warmup": 0,
    "final_warmup": 4,
    "mask_interval": 2,
    "asa_schedule_exponent": 1.0,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_on_another_base_it_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "AdamssConfig", **SIZES)
    base = LLAMA.make()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = LLAMA.read(base)
    with pytest.raises(BaseMismatchError, match=r"q_proj: the base's rows fall into groups of \["):
        veneer.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(LLAMA.read(base), before)


def test_layers_that_the_targets_do_not_tell_have_all_their_groups(tmp_path: Path) -> None:
    expected = made(tmp_path, "AdamssConfig", **SIZES)
    edit(tmp_path, target_modules=["nowhere"])
    assert gap(loaded(tmp_path), expected) < 1e-5


def test_without_its_package_it_is_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UnsupportedError, match=r"scikit-learn.*pip install '\.\[adamss\]'"):
        veneer.get_peft_model(LLAMA.make(), veneer.AdamssConfig(**SIZES))


def test_rows_that_are_all_the_same_are_no_groups() -> None:
    base = LLAMA.make()
    torch.nn.init.ones_(base.get_submodule("model.layers.0.self_attn.q_proj").weight)
    with pytest.raises(UnsupportedError, match=r"q_proj: its rows do not fall into 3 groups"):
        veneer.get_peft_model(base, veneer.AdamssConfig(**{**SIZES, "r": 1}))


def test_merged_from_disk_to_disk_it_is_what_it_is_in_memory(tmp_path: Path) -> None:
    gpt2 = NETWORKS["gpt2"]
    gpt2.make().save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(gpt2.make(), veneer.AdamssConfig(**{**SIZES, "target_modules": ["c_attn"]}))
    assert model.get_layer_status()[0].requires_grad == {"default": True}
    expected = gpt2.read(scrambled(model, Case("", "", "")))
    model.save_pretrained(tmp_path / "adapter")
    veneer.merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "merged")
    merged = veneer.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert gap(gpt2.read(merged), expected) < 1e-5
    assert gap(expected, gpt2.read(gpt2.make())) > 0.02


def train(model: Any, steps: range) -> None:
    batch = {**LLAMA.batch(), "labels": LLAMA.batch()["input_ids"]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in steps:
        model.train()(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def groups(model: Any) -> dict[str, torch.Tensor]:
    """The tensors A of the groups that are still trained, by their names."""
    return {name: p for name, p in model.named_parameters() if "adamss_A" in name and p.requires_grad}


def test_without_a_schedule_there_is_nothing_to_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.AdamssConfig(**SIZES))
    with pytest.raises(veneer.AdapterError, match="use_asa"):
        model.update_and_allocate(1)
    monkeypatch.setattr("veneer.adapters.training_step.stands_in_for_peft", lambda: True)
    before = groups(model)
    model.base_model.update_and_allocate(1)
    assert groups(model).keys() == before.keys()


def test_training_goes_on_with_the_groups_that_matter_most(tmp_path: Path) -> None:
    peft.get_peft_model(LLAMA.make(), peft.AdamssConfig(**SIZES, **SCHEDULE)).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(LLAMA.make(), tmp_path, is_trainable=True)
    ours = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path, is_trainable=True)
    every = groups(ours)
    for model in (theirs, ours):
        train(model, range(3))
    assert len(every) == 12
    # peft leaves out the last of those that its schedule keeps: it wants scores above that one's own.
    assert len(groups(ours)) == 7
    assert len(groups(theirs)) == 6
    assert groups(theirs).keys() < groups(ours).keys()
    frozen = {name: tensor.clone() for name, tensor in every.items() if name not in groups(ours)}
    ours.set_adapter("default")
    ours.base_model.update_and_allocate(3)
    assert len(groups(ours)) == 7
    train(ours, range(3, 6))
    assert len(groups(ours)) == 2
    assert all(torch.equal(every[name], tensor) for name, tensor in frozen.items())
