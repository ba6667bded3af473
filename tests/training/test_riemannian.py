"""Optimisers that step LoRA's factors along the metric of low-rank matrices, against peft's."""

from __future__ import annotations

from typing import Any

import peft.optimizers
import pytest
import torch

import veneer
from tests.models import build, inputs
from veneer.training.riemannian import create_riemannian_optimizer


def both(**options: Any) -> list[Any]:
    models = []
    for library in (peft, veneer):
        config = library.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False, **options)
        models.append(library.get_peft_model(build("llama"), config).eval())
    models[1].load_state_dict(models[0].state_dict())
    return models


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_steps_are_those_of_peft(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    models = both(**options)
    makers = (peft.optimizers.create_riemannian_optimizer, create_riemannian_optimizer)
    for model, make in zip(models, makers, strict=True):
        optimizer = make(model, kind, lr=1e-2, reg=1e-3)
        assert isinstance(optimizer, kind)
        for _ in range(3):
            step(model, optimizer)
    expected, state = (model.state_dict() for model in models)
    # AdamW divides by the root of squares, which magnifies what the two round otherwise.
    assert all(torch.allclose(state[name], expected[name], atol=2e-4) for name in expected)


def test_what_does_not_fit_is_refused() -> None:
    model = both()[1]
    with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer"):
        create_riemannian_optimizer(model, dict, lr=1)  # type: ignore[arg-type]
    with pytest.raises(veneer.ConfigError, match="requires a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1)
    with pytest.raises(ValueError, match="lora_A/lora_B parameter pairs"):
        create_riemannian_optimizer(build("llama"), torch.optim.SGD, lr=1)
    with pytest.raises(veneer.UnknownKeywordError, match="betas"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1, betas=(0, 0))
    with pytest.raises(ValueError, match="does not support closures"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1).step(lambda: 0.0)
