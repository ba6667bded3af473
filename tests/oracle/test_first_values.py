"""A new adapter's tensors are drawn as peft draws them: which are zero, and how large the others are."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import gap


class Net(nn.Module):
    """A layer of each kind, wide enough to tell distributions apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear = nn.Embedding(400, 64), nn.Linear(64, 64)
        self.conv, self.grouped = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=2)


def drawn(library: Any, kind: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = library.get_peft_model(Net(), getattr(library, kind)(**options))
    return {name: p.detach() for name, p in model.named_parameters() if ".default" in name}


@pytest.mark.parametrize("layer", ["embed", "linear", "conv", "grouped"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", {}),
        ("LoraConfig", {"init_lora_weights": "gaussian"}),
        ("LoraConfig", {"init_lora_weights": "gaussian", "use_rslora": True}),
        ("HiraConfig", {}),
        ("HiraConfig", {"init_weights": "gaussian"}),
    ],
)
def test_first_values(kind: str, options: dict[str, Any], layer: str) -> None:
    if (kind, layer) == ("HiraConfig", "grouped"):
        pytest.skip("HiRA is refused there")
    chosen = {"r": 16, "target_modules": [layer], **options}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of peft's, about groups
        theirs = drawn(peft, kind, chosen)
    ours = drawn(veneer, kind, chosen)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert bool(ours[name].count_nonzero()) == bool(tensor.count_nonzero()), name
        assert float(ours[name].std()) == pytest.approx(float(tensor.std()), rel=0.15), name


@pytest.mark.parametrize("kind", ["VeraConfig", "PveraConfig", "RandLoraConfig"])
@pytest.mark.parametrize("start", [True, False])
def test_first_values_beside_a_frozen_projection(kind: str, start: bool) -> None:
    options = {"r": 64, "target_modules": ["linear"], "init_weights": start}
    theirs, ours = drawn(peft, kind, options), drawn(veneer, kind, options)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float(ours[name].mean()) == pytest.approx(float(tensor.mean()), abs=0.4), name
        assert float(ours[name].std()) == pytest.approx(float(tensor.std()), rel=0.3, abs=1e-6), name


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["all layers", "biases"])
@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_in_the_place_of_peft_a_seed_gives_the_same_values(
    start: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if options and start == "gaussian":
        pytest.skip("peft begins no biases so")
    monkeypatch.setattr("veneer.methods.lora.stands_in_for_peft", lambda: True)
    layers = ["linear"] if options else ["conv", "embed", "grouped", "linear"]
    options = {"r": 4, "target_modules": layers, "init_lora_weights": start, **options}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of peft's, about groups
        theirs, ours = drawn(peft, "LoraConfig", options), drawn(veneer, "LoraConfig", options)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_ia3_on_the_input_of_a_convolution_in_groups() -> None:
    """peft scales the input; merged here, each group's rows take the scales of the channels that they see."""

    def made(library: Any) -> Any:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(), nn.Conv1d(5, 6, 1))
        config = library.IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False)
        return library.get_peft_model(base[:2], config).eval()

    ours, theirs = made(veneer), made(peft)
    scale = {name: p for name, p in theirs.named_parameters() if "ia3_l" in name}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(scale[name])
        x = torch.randn(2, 8, 5, 5)
        expected = theirs(x)
        assert gap(ours(x), expected) < 1e-5
        assert gap(ours.merge_and_unload()(x), expected) < 1e-5
