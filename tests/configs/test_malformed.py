"""Configs whose values are of the wrong type: inspection tells, and prints, instead of failing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import save_file

import veneer

GOOD = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "lora_alpha": 8, "target_modules": ["q"]}
TENSORS = {"base_model.model.q.lora_A.weight": torch.ones(4, 3), "base_model.model.q.lora_B.weight": torch.ones(3, 4)}


def printed(found: veneer.Inspection) -> str:
    json.dumps(found.to_dict())
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("target_modules", 7),
        ("target_modules", [1, 2]),
        ("modules_to_save", [None]),
        ("base_model_name_or_path", 5),
        ("revision", 3),
        ("task_type", ["CAUSAL_LM"]),
        ("peft_type", ["LORA"]),
    ],
)
def test_a_value_of_an_adapters_config(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**GOOD, key: value}))
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    found = veneer.inspect(tmp_path)
    assert any(key in problem.message and problem.hint for problem in found.problems)
    assert "1 adapted" in printed(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", 3),
        ("architectures", [3]),
        ("model_type", {}),
        ("dtype", {"a": 1}),
        ("quantization_config", "gptq"),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_value_of_a_models_config(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    found = veneer.inspect(tmp_path)
    assert [problem.code for problem in found.problems] == ["config"]
    assert key in found.problems[0].message
    assert "2 parameters" in printed(found)


def test_what_is_as_it_should_be_is_no_problem(tmp_path: Path) -> None:
    values = {"architectures": ["A"], "tie_word_embeddings": False, "quantization_config": {"quant_method": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert veneer.inspect(tmp_path).problems == ()


def test_a_base_whose_name_is_too_long_for_a_path(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**GOOD, "base_model_name_or_path": "/" + "x" * 300}))
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert [problem.code for problem in veneer.inspect(tmp_path).problems] == ["base-not-found"]


def test_a_model_without_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").stat().st_size == 40
    assert [problem.code for problem in veneer.inspect(tmp_path).problems] == ["empty-checkpoint"]


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE"])
def test_no_header_is_fetched_when_the_network_is_switched_off(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, repo, **_: asked.append(repo) or 1 / 0
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setenv(how, "1")
    found = veneer.inspect("owner/name", local_files_only=how == "argument")
    assert asked == []
    assert [problem.code for problem in found.problems] == ["no-weights"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    veneer.inspect("owner/name")
    assert asked == ["owner/name"]
