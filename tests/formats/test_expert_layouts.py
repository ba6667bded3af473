"""Fused experts in the layouts of Unsloth and of older versions of PEFT: the change is their writer's, or they ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import veneer
from tests.formats.families import saved_family
from tests.formats.same_changes import assert_same
from tests.formats.test_mlx import adapter_of, weight_changes
from tests.random_adapters import edit_config, edit_tensors
from veneer.errors import UnsupportedError, UsageError

EXPERTS = 4
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
UNSLOTH = {"auto_mapping": {"base_model_class": "X", "parent_library": "y", "unsloth_fixed": True}}


def of_now(folder: Path, model_type: str, **options: Any) -> Path:
    """An adapter of the experts in the layout of now."""
    chosen = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "rank_pattern": {"down_proj": 3}}
    return adapter_of(folder, model_type, **{**chosen, **options})


def is_expert(key: str) -> bool:
    return ".experts." in key


def grouped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as Unsloth had them: all columns of one expert, then those of the next."""
    moved = dict(tensors)
    for key, tensor in tensors.items():
        if is_expert(key) and key.endswith("lora_B.weight"):
            columns = [tensor[:, expert::EXPERTS] for expert in range(EXPERTS)]
            moved[key] = torch.cat(columns, 1)
    return moved


def exchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as older versions of PEFT have them: the LoRA of each expert's transposed matrix."""
    moved = dict(tensors)
    for key, down in tensors.items():
        if not is_expert(key) or not key.endswith("lora_A.weight"):
            continue
        other = key.replace("lora_A", "lora_B")
        rank = down.shape[0] // EXPERTS
        new_up = torch.empty(down.shape[1], rank * EXPERTS)
        new_down = torch.empty(rank * EXPERTS, tensors[other].shape[0])
        for expert in range(EXPERTS):
            new_down[expert * rank : expert * rank + rank] = tensors[other][:, expert::EXPERTS].T
            new_up[:, expert::EXPERTS] = down[expert * rank : expert * rank + rank].T
        moved[key], moved[other] = new_down, new_up
    return moved


def rewritten(folder: Path, *changes: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """A copy of an adapter with its tensors as another writer has them."""
    copy = folder.with_name(f"{folder.name}-rewritten")
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for change in changes:
        edit_tensors(copy, change)
    edit_config(copy, **config)
    return copy


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("config", [{"lora_B_layout": "grouped_by_expert"}, UNSLOTH])
def test_columns_by_expert(tmp_path: Path, model_type: str, config: dict[str, Any]) -> None:
    base = saved_family(tmp_path / "base", model_type)
    adapter = of_now(tmp_path / "adapter", model_type)
    unsloth = rewritten(adapter, grouped, **config)
    experts = None if "lora_B_layout" in config else "grouped"
    report = veneer.convert(unsloth, tmp_path / "back", base=base, experts=experts)
    assert any("grouped by expert" in note for note in report.notes)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert written["lora_B_layout"] == "rank_major"
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))
    if experts is None:
        assert_same(weight_changes(unsloth, base), weight_changes(adapter, base))


def test_unsloths_files_without_the_mark_ask(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "mixtral")
    adapter = of_now(tmp_path / "adapter", "mixtral")
    unsloth = rewritten(adapter, base_model_name_or_path="unsloth/Mixtral")
    with pytest.raises(UsageError, match="--experts grouped") as caught:
        veneer.convert(unsloth, tmp_path / "back", base=base)
    assert "--experts rank-major" in str(caught.value)
    with pytest.raises(UsageError, match="veneer convert"):
        veneer.load(unsloth, base=base)
    assert "experts" in [problem.code for problem in veneer.inspect(unsloth).problems]
    veneer.convert(unsloth, tmp_path / "back", base=base, experts="rank-major")
    assert "experts" not in [problem.code for problem in veneer.inspect(tmp_path / "back").problems]
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))
    edit_config(unsloth, lora_B_layout="another")
    with pytest.raises(UnsupportedError, match="'another'"):
        veneer.convert(unsloth, tmp_path / "again", base=base)


def test_what_has_no_experts_does_not_ask(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", "llama")
    edit_config(adapter, base_model_name_or_path="unsloth/llama", **UNSLOTH)
    veneer.convert(adapter, tmp_path / "back")
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("model_type", "version", "is_exchanged"),
    [
        ("mixtral", "0.18.1", True),
        ("mixtral", "0.19.0", True),
        ("mixtral", "0.19.1", False),
        ("gpt_oss", "0.18.1", False),
        ("gpt_oss", "0.19.0", True),
        ("gpt_oss", "0.21.0", False),
        ("qwen3_moe", ..., True),
    ],
)
def test_older_versions_of_peft(tmp_path: Path, model_type: str, version: Any, is_exchanged: bool) -> None:
    base = saved_family(tmp_path / "base", model_type)
    adapter = of_now(tmp_path / "adapter", model_type)
    changes = [exchanged] if is_exchanged else []
    old = rewritten(adapter, *changes, peft_version=version, ensure_weight_tying=...)
    veneer.convert(old, tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))
    assert_same(weight_changes(old, base), weight_changes(adapter, base))
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (written.get("peft_version") is None) == (is_exchanged or version is ...)


def test_both_at_once_as_unsloth_on_an_older_peft(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "mixtral")
    adapter = of_now(tmp_path / "adapter", "mixtral")
    old = rewritten(adapter, exchanged, grouped, peft_version="0.18.1", **UNSLOTH)
    veneer.convert(old, tmp_path / "mlx", to="mlx", base=base, experts="grouped")
    veneer.convert(tmp_path / "mlx", tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_square_parameter_follows_the_others_or_the_version(tmp_path: Path, model_type: str) -> None:
    square = {"intermediate_size": 32}
    base = saved_family(tmp_path / "base", model_type, **square)
    adapter = of_now(tmp_path / "adapter", model_type, config=square)
    old = rewritten(adapter, exchanged, peft_version="0.19.0")
    veneer.convert(old, tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))
    alone = of_now(tmp_path / "alone", model_type, config=square, target_parameters=["experts.down_proj"])
    unsaid = rewritten(alone, exchanged, ensure_weight_tying=...)
    edit_config(unsaid, peft_version="0.19.0")
    veneer.convert(unsaid, tmp_path / "said", base=base)
    assert_same(weight_changes(tmp_path / "said", base), weight_changes(alone, base))
    edit_config(unsaid, peft_version=...)
    if model_type == "mixtral":
        with pytest.raises(UsageError, match="peft_version"):
            veneer.convert(unsaid, tmp_path / "asked", base=base)
    edit_config(alone, peft_version="0.18.1")
    is_as_now = model_type == "gpt_oss"
    veneer.convert(alone, tmp_path / "as-told", base=base)
    edit_config(alone, peft_version=..., ensure_weight_tying=False)
    told = weight_changes(tmp_path / "as-told", base)
    now = weight_changes(alone, base)
    assert all(torch.allclose(told[name], now[name], atol=1e-5) for name in now if "experts" in name) == is_as_now


def test_a_router_is_no_stack(tmp_path: Path) -> None:
    base = saved_family(tmp_path / "base", "mixtral")
    adapter = of_now(tmp_path / "adapter", "mixtral", target_parameters=["mlp.gate.weight"], rank_pattern={})
    edit_config(adapter, **UNSLOTH)
    veneer.convert(adapter, tmp_path / "back", base=base)
    assert_same(weight_changes(tmp_path / "back", base), weight_changes(adapter, base))
