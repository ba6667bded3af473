"""PVeRA's draws: in training as in peft, at inference where the config asks for it, and then in no weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import veneer
from tests.methods.networks import NETWORKS
from tests.models import gap
from veneer.errors import MergeError

LLAMA = NETWORKS["llama"]


def options(**more: Any) -> dict[str, Any]:
    return {"r": 6, "target_modules": ["q_proj", "down_proj"], "generator_seed": 3, **more}


@torch.no_grad()
def _made(folder: Path, **more: Any) -> Any:
    """A model of peft's with such an adapter, which it has saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(LLAMA.make(), peft.PveraConfig(**options(**more)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(folder)
    return model


def _twice(model: Any) -> list[Tensor]:
    return [LLAMA.read(model) for _ in range(2)]


@pytest.mark.oracle
def test_training_draws_as_in_peft(tmp_path: Path) -> None:
    theirs = _twice(_made(tmp_path).train())
    model = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path, is_trainable=True)
    assert gap(LLAMA.read(model.eval()), LLAMA.read(model)) == 0, "the mean is not drawn"
    ours = _twice(model.train())
    assert gap(ours[0], ours[1]) > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        assert gap(one, other) < 1e-5


@pytest.mark.oracle
def test_inference_draws_where_the_config_asks_for_it(tmp_path: Path) -> None:
    theirs = _twice(_made(tmp_path, sample_at_inference=True).eval())
    model = veneer.PeftModel.from_pretrained(LLAMA.make(), tmp_path)
    ours = _twice(model)
    assert gap(ours[0], ours[1]) > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        assert gap(one, other) < 1e-5
    with pytest.raises(MergeError, match="sample_at_inference"):
        model.merge_and_unload()


def test_without_a_seed_the_draws_are_torchs_own() -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.PveraConfig(**options(generator_seed=None, init_weights=False)))
    torch.manual_seed(1)
    first = LLAMA.read(model.train())
    assert gap(LLAMA.read(model), first) > 1e-3
    torch.manual_seed(1)
    assert gap(LLAMA.read(model), first) == 0


def test_the_variance_learns_in_training() -> None:
    model = veneer.get_peft_model(LLAMA.make(), veneer.PveraConfig(**options(init_weights=False)))
    LLAMA.output(model.train()).square().mean().backward()
    learned = [p.grad[6:] for name, p in model.named_parameters() if "lambda_d" in name]
    assert learned
    assert all(bool(grad.any()) for grad in learned)
