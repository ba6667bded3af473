"""A pass under adapters reads no value back from the device, which it would have to wait for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from tests.models import build, gap, inputs
from tests.random_adapters import enlarge
from veneer.patches import selection

X: Any = inputs("qwen2")
# What reads a value, or whose result has a shape that depends on values.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "item", "count_nonzero"}

CONFIGS: dict[str, veneer.PeftConfig] = {
    "lora": veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "dora": veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "bias": veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_bias=True),
    "ia3": veneer.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": veneer.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}


class Reads(TorchDispatchMode):
    """Collects the operations that read a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket.__name__ in READS:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def reads(model: veneer.PeftModel, **choice: Any) -> list[str]:
    """The operations of one pass that read a value."""
    with torch.no_grad(), Reads() as seen:
        model(**X, **choice)
    return seen.names


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> veneer.PeftModel:
    model = veneer.get_peft_model(build("qwen2"), CONFIGS[request.param], adapter_name="a").eval()
    model.add_adapter("b", CONFIGS[request.param])
    for name, seed in (("a", 1), ("b", 2)):
        enlarge(model, name, seed)
        model.set_requires_grad(name, False)
    return model


def test_nothing_is_read_back(model: veneer.PeftModel) -> None:
    with model.disable_adapter():
        base = reads(model)
    assert reads(model) == base, "the first pass, which fuses"
    assert reads(model) == base
    model.set_adapter("b")
    assert reads(model) == base, "the first after a switch"


@pytest.mark.parametrize("rows", [["a", "b"], ["b", "a"], ["a", "__base__"], ["a", "a"]])
def test_nothing_is_read_back_for_rows(model: veneer.PeftModel, rows: list[str]) -> None:
    with model.disable_adapter():
        base = reads(model)
    reads(model, adapter_names=rows)  # it finds out where the layers have the rows
    assert reads(model, adapter_names=rows) == base
    assert reads(model, adapter_names=rows[::-1]) == base, "another batch"


def test_rows_are_placed_once(model: veneer.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["a", "b"]
    with torch.inference_mode():
        model(**X, adapter_names=rows)
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(selection, "on_device", None)
        patched.setattr(selection, "row_order", None)
        model(**X, adapter_names=rows)
    model.train()
    model.set_requires_grad("a", True)
    model(**X, adapter_names=rows).logits.sum().backward()  # with the places that inference mode made
    model.delete_adapter("b")
    with pytest.raises(veneer.UnknownAdapterError):
        model(**X, adapter_names=rows)


def test_kept_rows_follow_the_set_of_adapters(model: veneer.PeftModel) -> None:
    """A name that means another adapter now is looked up again."""
    rows = ["a", "b"]
    with torch.no_grad():
        before = model(**X, adapter_names=rows).logits
        model.rename_adapter("a", "c")
        model.rename_adapter("b", "a")
        model.rename_adapter("c", "b")
        after = model(**X, adapter_names=rows[::-1]).logits
    assert gap(before, after) < 1e-6
