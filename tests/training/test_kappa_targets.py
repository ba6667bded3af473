"""Targets chosen by the condition numbers of the base's weights, against peft's."""

from __future__ import annotations

import peft.helpers
import pytest
import torch
from torch import nn

import veneer
from tests.models import build


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(3))
        self.linear = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))


@pytest.mark.oracle
@pytest.mark.parametrize("top_p", [0.1, 0.34, 0.5, 1.0])
def test_they_are_those_of_peft(top_p: float) -> None:
    torch.manual_seed(0)
    for model in (Model(), build("llama")):
        expected = peft.helpers.find_kappa_target_modules(model, top_p=top_p, show_progress=False)
        assert veneer.find_kappa_target_modules(model, top_p=top_p, show_progress=False) == expected


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(veneer.UsageError, match="top_p=0"):
        veneer.find_kappa_target_modules(Model(), top_p=0)
