"""An adapter trains here as it does in peft: the same gradients, and none for the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
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


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_gradients_of_a_llama_to_float32s_last_digits(
    options: dict[str, Any], base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = lora_config("llama", r=4, target_modules=list(CASES["llama"].targets), **options)
    scramble(peft.get_peft_model(base_model("llama", base_folder("llama")), config)).save_pretrained(tmp_path)
    found, expected = (
        gradients(
            library.PeftModel.from_pretrained(base_model("llama", base_folder("llama")), tmp_path, is_trainable=True),
            "llama",
        )
        for library in (veneer, peft)
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-6, name
