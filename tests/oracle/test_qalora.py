"""QA-LoRA: as peft computes it, which has it on GPTQ layers only; here its forward pass is put on plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file

import veneer
from tests.models import build, gap, inputs, logits
from tests.oracle.peer import VISIBLE, WEIGHTS, scramble

pytestmark = pytest.mark.oracle

CLOSE = 1e-5
OPTIONS = {
    "r": 4,
    "lora_alpha": 6,
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "down_proj"],
    "use_qalora": True,
    "qalora_group_size": 4,
}


def grouped(**options: Any) -> veneer.PeftModel:
    return veneer.get_peft_model(build("llama"), veneer.LoraConfig(**{**OPTIONS, **options}), seed=1).eval()


def theirs() -> Any:
    """A model of peft whose plain layers have the QA-LoRA of its GPTQ layers."""
    model: Any = peft.get_peft_model(build("llama"), peft.LoraConfig(**OPTIONS))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            variant = QALoraLinearVariant()
            variant.init(module, "default", model.peft_config["default"])
            module.lora_variant["default"] = variant
    return model


def test_what_peft_saved_computes_the_same(tmp_path: Path) -> None:
    model = scramble(theirs())
    expected = logits(model, inputs("llama"))
    assert gap(expected, logits(build("llama"), inputs("llama"))) > VISIBLE
    model.save_pretrained(tmp_path / "peft")
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path / "peft")
    assert gap(logits(here, inputs("llama")), expected) < CLOSE
    here.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 12)


def test_what_is_saved_here_computes_the_same_in_peft(tmp_path: Path) -> None:
    mine = scramble(grouped())
    mine.save_pretrained(tmp_path)
    other = theirs().eval()
    peft.set_peft_model_state_dict(other, load_file(tmp_path / WEIGHTS))
    assert gap(logits(mine, inputs("llama")), logits(other, inputs("llama"))) < CLOSE


def test_a_plain_lora_that_only_says_so_is_one(tmp_path: Path) -> None:
    """peft leaves the option aside on layers that are not packed by GPTQ, and saves it all the same."""
    model = scramble(peft.get_peft_model(build("llama"), peft.LoraConfig(**OPTIONS)))
    model.save_pretrained(tmp_path)
    here = veneer.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert gap(logits(here, inputs("llama")), logits(model, inputs("llama"))) < CLOSE


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"target_modules": "all-linear"}])
def test_merged_it_is_what_it_was(options: dict[str, Any]) -> None:
    model = grouped(**options)
    assert gap(logits(model, inputs("llama")), logits(build("llama"), inputs("llama"))) < CLOSE
    expected = logits(scramble(model), inputs("llama"))
    assert gap(logits(model.merge_and_unload(), inputs("llama")), expected) < CLOSE


def test_the_change_is_that_of_summed_groups() -> None:
    model = scramble(grouped())
    layer = model.adapters.layers["model.layers.0.self_attn.q_proj"]
    down, up = (layer.get_submodule(f"lora_{which}.default").weight.detach() for which in "AB")
    x = torch.randn(3, 32)
    pooled = x.view(3, 8, 4).mean(2) * 8
    with torch.no_grad():
        change = layer(x) - layer.base_layer(x)
    assert gap(change, 1.5 * pooled @ down.T @ up.T) < 1e-4


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"qalora_group_size": 5}, veneer.UnsupportedError, "no multiple of qalora_group_size=5"),
        ({"qalora_group_size": 0}, veneer.ConfigError, "qalora_group_size=0"),
        ({"init_lora_weights": "pissa"}, veneer.ConfigError, "pissa"),
        ({"target_modules": ["embed_tokens"]}, veneer.UnsupportedError, "QA-LoRA"),
    ],
)
def test_each_mistake_has_its_error(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        grouped(**options)
