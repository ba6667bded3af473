"""SHiRA with a mask of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE
from veneer.errors import ConfigError, UnsupportedError


def first(layer: nn.Module, r: int) -> Tensor:
    """A mask with ones at the beginning."""
    weight: Any = layer.weight
    mask = torch.zeros(weight.numel())
    mask[: r * sum(weight.shape)] = 1
    return mask.view(weight.shape)


def config(**options: Any) -> veneer.ShiraConfig:
    return veneer.ShiraConfig(r=2, mask_type="custom", init_weights=False, **options)


@pytest.mark.parametrize(("arch", "layer"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_it_trains_the_weights_of_the_mask(arch: str, layer: str, tmp_path: Path) -> None:
    chosen = config(target_modules=[layer])
    chosen.mask_fn = first  # type: ignore[misc]
    model = veneer.get_peft_model(build(arch), chosen, seed=1).eval()
    expected, plain = logits(model, inputs(arch)), build(arch)
    assert gap(expected, logits(plain, inputs(arch))) > VISIBLE
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(build(arch), tmp_path)
    assert torch.equal(logits(loaded, inputs(arch)), expected)
    name = next(name for name, _ in plain.named_modules() if name.endswith(layer))
    before, after = (m.get_submodule(name).weight for m in (plain, model.merge_and_unload()))
    assert torch.equal((before != after).float(), first(plain.get_submodule(name), 2))  # type: ignore[arg-type]


def test_a_mask_that_is_none_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="mask_fn is None"):
        veneer.get_peft_model(build("llama"), config(target_modules=["q_proj"]))
    wrong = config(target_modules=["q_proj"])
    wrong.mask_fn = lambda layer, r: torch.ones(2, 2)  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"the shape \(2, 2\) and 4 ones"):
        veneer.get_peft_model(build("llama"), wrong)
