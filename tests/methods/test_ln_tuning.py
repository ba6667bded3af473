"""LN tuning on layers of kinds that no other method adapts. peft is the oracle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import gap
from tests.random_adapters import WEIGHTS
from veneer.errors import TargetError, UnsupportedError

TARGETS = ["grow", "pair"]


class Net(nn.Module):
    """A transposed convolution and a bilinear layer: input ``(2, 4, 3, 3)``, output ``(2, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.pair = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.grow(x)).mean((2, 3))
        found: Tensor = self.pair(y, y.flip(1))
        return found


def _net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def _theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_net(), peft.LNTuningConfig(target_modules=TARGETS)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.oracle
@torch.no_grad()
def test_layers_of_any_kind_are_trained_whole_as_in_peft(tmp_path: Path) -> None:
    theirs, x = _theirs(), torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    base, wanted = _net()(x), theirs(x)
    assert gap(wanted, base) > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = veneer.PeftModel.from_pretrained(_net(), tmp_path / "theirs")
    assert gap(ours(x), wanted) < 1e-6
    rows = ours(x, adapter_names=["__base__", "default"])
    assert gap(rows[0], base[0]) < 1e-6
    assert gap(rows[1], wanted[1]) < 1e-6
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    with pytest.raises(UnsupportedError, match="grow"):
        veneer.convert_to_lora(ours, out=tmp_path / "lora", rank=2)
    merged = ours.merge_and_unload()
    assert isinstance(merged.grow, nn.ConvTranspose2d)
    assert gap(merged(x), wanted) < 1e-6


def test_a_layer_whose_forward_is_never_called_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TargetError, match="out_proj"):
        veneer.get_peft_model(model, veneer.LNTuningConfig(target_modules=["out_proj"]))
