"""An adapter trains here as it does in peft: the same gradients, and none for the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import CASES, gap, inputs
from tests.oracle.peer import base_model, lora_config, scramble

pytestmark = pytest.mark.oracle

CLOSE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def arch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(arch: str, base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on which every gradient is non-zero."""
    place = tmp_path_factory.mktemp("gradients")
    config = lora_config(arch, r=4, target_modules=list(CASES[arch].targets))
    scramble(peft.get_peft_model(base_model(arch, base_folder(arch)), config)).save_pretrained(place)
    return place


def gradients(model: nn.Module, arch: str) -> dict[str, Tensor]:
    """Name -> gradient of a loss that every logit takes part in."""
    model(**inputs(arch)).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients(arch: str, folder: Path, base_folder: Callable[[str], Path], checkpointing: bool) -> None:
    bases = [base_model(arch, base_folder(arch)) for _ in range(2)]
    ours = veneer.PeftModel.from_pretrained(bases[0], folder, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(bases[1], folder, is_trainable=True)
    if checkpointing:
        ours.activation_checkpointing_enable()
        ours.train()  # else nothing is checkpointed
    found, expected = gradients(ours, arch), gradients(theirs.eval(), arch)
    assert found.keys() == expected.keys()
    assert all(".lora_" in name or ".modules_to_save." in name for name in found)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"nothing to compare at {name}"
        assert gap(found[name], gradient) < CLOSE, name


def test_gradients_of_a_llama_to_float32s_last_digits(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = lora_config("llama", r=4, target_modules=list(CASES["llama"].targets))
    scramble(peft.get_peft_model(base_model("llama", base_folder("llama")), config)).save_pretrained(tmp_path)
    found, expected = (
        gradients(
            library.PeftModel.from_pretrained(base_model("llama", base_folder("llama")), tmp_path, is_trainable=True),
            "llama",
        )
        for library in (veneer, peft)
    )
    assert_last_digits(found, expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_gradients_of_a_layer_to_float32s_last_digits(options: dict[str, Any]) -> None:
    """Through more layers, peft's own gradients for DoRA are farther than this from those in float64."""
    models = [
        library.get_peft_model(
            nn.Sequential(nn.Linear(64, 48)), library.LoraConfig(target_modules=["0"], **options)
        ).eval()
        for library in (veneer, peft)
    ]
    theirs = dict(scramble(models[1]).named_parameters())
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            parameter.copy_(theirs[name])
    for model in models:
        model(x).square().mean().backward()
    found, expected = ({name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models)
    assert_last_digits(found, expected)


def assert_last_digits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-6, name
