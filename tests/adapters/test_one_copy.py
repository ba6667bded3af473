"""An adapter's tensors go to a device in one copy: tried on the CPU, which is no other device than any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.models import build, inputs
from tests.random_adapters import enlarge
from veneer.adapters import attach_layers, one_copy

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "turned": torch.arange(12, dtype=torch.float16).view(3, 4).t(),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


def test_the_copies_are_the_tensors() -> None:
    copies = one_copy.copied_in_one(TENSORS, torch.device("cpu"))
    assert copies.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert copies[name].dtype is tensor.dtype
        assert torch.equal(copies[name], tensor)
        assert copies[name].is_contiguous()
        assert copies[name].data_ptr() % 16 == 0
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 1


def test_each_copy_has_a_version_of_its_own() -> None:
    copies = one_copy.copied_in_one(TENSORS, torch.device("cpu"))
    before = {name: copy._version for name, copy in copies.items()}
    copies["a"].add_(1)
    assert [name for name, copy in copies.items() if copy._version != before[name]] == ["a"]
    assert torch.equal(copies["b"], TENSORS["b"])


@pytest.mark.parametrize(("trainable", "copies"), [(False, 1), (True, 0)])
def test_a_loaded_adapter_comes_in_one_copy(
    trainable: bool, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trained = veneer.get_peft_model(build("llama"), config)
    enlarge(trained, "default", 1)
    trained.save_pretrained(tmp_path)
    made: list[int] = []

    def copied_in_one(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        made.append(len(tensors))
        return one_copy.copied_in_one(tensors, device)

    monkeypatch.setattr(attach_layers, "copied_in_one", copied_in_one)
    monkeypatch.setattr(attach_layers, "_NOT_WAITED_FOR", frozenset())
    model = veneer.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=trainable).eval()
    assert len(made) == copies
    x = inputs("llama")
    with torch.no_grad():
        assert torch.equal(model(**x).logits, trained.eval()(**x).logits)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
