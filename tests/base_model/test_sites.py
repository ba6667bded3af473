"""Each kind of site knows the form of a LoRA on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.base_model.catalog import Catalog
from veneer.base_model.sites import bias_site, sites_for, whole_sites
from veneer.base_model.sites.parameter import ParameterSite
from veneer.base_model.sites.site import Site


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 6, 4))


def only(module: nn.Module) -> Site:
    [site] = sites_for("layer", module)
    return site


SITES: dict[str, Callable[[], Site]] = {
    "linear": lambda: only(nn.Linear(4, 6)),
    "Conv1D": lambda: only(Conv1D(6, 4)),
    "embedding": lambda: only(nn.Embedding(4, 6)),
    "convolution": lambda: only(nn.Conv2d(2, 6, (1, 2))),
    "experts": lambda: ParameterSite("layer", Experts(), "up", "layer"),
    "experts, swapped": lambda: ParameterSite("layer", Experts(), "up", "layer", swapped=True),
    "attention's output": lambda: sites_for("layer", nn.MultiheadAttention(6, 2))[0],
    "attention's input": lambda: sites_for("layer", nn.MultiheadAttention(6, 2))[1],
}


@pytest.mark.parametrize("make", SITES.values(), ids=SITES)
def test_a_change_becomes_a_lora_and_comes_back(make: Callable[[], Site]) -> None:
    site = make()
    stack, (out, inner) = () if site.stack is None else (site.stack,), site.shape
    up, down = torch.randn(*stack, out, 2), torch.randn(*stack, 2, inner)
    tensors = site.as_low_rank(up, down)
    assert tuple(tensors) == site.low_rank_names
    assert tuple(tuple(tensor.shape) for tensor in tensors.values()) == site.low_rank_shapes(2)
    again_up, again_down = site.low_rank_factors(*tensors.values())
    assert torch.allclose(again_up * site.low_rank_gain, up)
    assert torch.equal(again_down, down)


@pytest.mark.parametrize(
    "site",
    [
        *whole_sites("norm", nn.LayerNorm(4)),
        *sites_for("grouped", nn.Conv2d(4, 4, 1, groups=2)),
        *whole_sites("other", nn.Bilinear(2, 2, 2)),
        bias_site("attention.out_proj", nn.MultiheadAttention(4, 2).out_proj, nn.MultiheadAttention(4, 2), True),
    ],
    ids=lambda site: site.name,
)
def test_no_lora_holds_every_change_of_these(site: Site) -> None:
    assert not site.has_low_rank_form
    with pytest.raises(veneer.UnsupportedError, match="a LoRA made from a change of the weight"):
        site.as_low_rank(torch.zeros(4, 1), torch.zeros(1, 4))


def test_attention_whose_keys_have_another_width_is_refused_with_the_reason() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, kdim=4)})
    with pytest.raises(veneer.TargetError, match=r"Only same embed for query/key/value is supported.*kdim"):
        Catalog(model).sites(veneer.LoraConfig(target_modules=["mha"]))
