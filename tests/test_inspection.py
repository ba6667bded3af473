"""What is at a path: told for what is whole, and for what is broken."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import veneer
from tests.adapters import CONFIG, WEIGHTS, adapted, config, edit_config, edit_tensors, enlarge, saved, saved_base
from tests.models import CASES
from veneer.errors import CorruptFileError, NotACheckpointError, PathNotFoundError


def codes(path: Path) -> list[str]:
    return [problem.code for problem in veneer.inspect(path).problems]


def named(folder: Path, **changes: Any) -> Path:
    """An adapter that names a base on the hub, so that it has no problem of its own."""
    edit_config(folder, **{"base_model_name_or_path": "owner/base", **changes})
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return named(saved(tmp_path / "adapter", rank_pattern={r"layers\.1\..*": 2}, lora_alpha=12, use_rslora=True))


def test_an_adapter(adapter: Path) -> None:
    found = veneer.inspect(adapter)
    assert (found.kind, found.problems, found.model, found.adapters) == ("adapter", (), None, {})
    facts = found.adapter
    assert facts is not None
    layers = len(CASES["llama"].targets)
    assert facts.ranks == {2: layers, 4: layers}
    assert (facts.peft_type, facts.base, facts.task, facts.alpha, facts.layers) == (
        "LORA",
        "owner/base",
        "CAUSAL_LM",
        12,
        2 * layers,
    )
    assert facts.options == {"use_rslora": True, "rank_pattern": {r"layers\.1\..*": 2}}
    assert facts.target_modules == list(CASES["llama"].targets)
    model = adapted(rank_pattern={r"layers\.1\..*": 2})
    parameters = sum(p.numel() for p in model.adapters.parameters("default"))
    assert facts.weights is not None
    assert (facts.weights.parameters, facts.weights.nbytes) == (parameters, 4 * parameters)
    assert (facts.weights.dtypes, facts.weights.files) == ({"F32": parameters}, [WEIGHTS])


def test_a_full_model(tmp_path: Path) -> None:
    found = veneer.inspect(saved_base(tmp_path / "base"))
    assert (found.kind, found.adapter, found.problems) == ("model", None, ())
    facts = found.model
    assert facts is not None
    assert (facts.architecture, facts.model_type, facts.dtype) == ("LlamaForCausalLM", "llama", "float32")
    assert (facts.tied_embeddings, facts.quantization) == (False, None)
    assert facts.weights is not None
    assert facts.weights.parameters > 0
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    again = veneer.inspect(tmp_path / "base").model
    assert again is not None
    assert again.quantization == {"quant_method": "gptq", "bits": 4}


def test_a_recorded_digest(tmp_path: Path) -> None:
    model = veneer.load(saved_base(tmp_path / "base"))
    model.add_adapter("default", config())
    model.save_pretrained(tmp_path / "adapter")
    facts = veneer.inspect(tmp_path / "adapter").adapter
    assert facts is not None
    assert facts.base_digest == model.base_digest
    assert str(facts.base_digest).startswith("sha256:")


def test_both_in_one_folder(adapter: Path, tmp_path: Path) -> None:
    saved_base(adapter)
    found = veneer.inspect(adapter)
    assert (found.kind, [p.code for p in found.problems]) == ("model+adapter", ["model-and-adapter"])
    (adapter / "model.safetensors").unlink()
    assert (veneer.inspect(adapter).kind, codes(adapter)) == ("adapter", [])


def test_a_set(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("french", config(r=2))
    enlarge(model, "french")
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "french"):
        named(folder)
    found = veneer.inspect(tmp_path)
    assert (found.kind, list(found.adapters), found.problems) == ("adapter", ["french"], ())
    assert found.adapters["french"].adapter is not None
    assert set(found.adapters["french"].adapter.ranks) == {2}
    (tmp_path / "french" / WEIGHTS).unlink()
    [problem] = veneer.inspect(tmp_path).problems
    assert (problem.code, problem.message.startswith("french: ")) == ("no-weights", True)


def test_single_files(adapter: Path, tmp_path: Path) -> None:
    assert veneer.inspect(adapter / WEIGHTS).adapter == veneer.inspect(adapter).adapter
    (adapter / CONFIG).unlink()
    alone = veneer.inspect(adapter / WEIGHTS)
    assert (alone.kind, [p.code for p in alone.problems]) == ("adapter", ["no-config"])
    save_file({"weight": torch.zeros(2)}, tmp_path / "some.safetensors")
    assert veneer.inspect(tmp_path / "some.safetensors").kind == "model"
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(NotACheckpointError):
        veneer.inspect(tmp_path / "x.txt")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError):
        veneer.inspect(tmp_path / "bad.safetensors")
    with pytest.raises(PathNotFoundError):
        veneer.inspect(tmp_path / "nothing")


def test_each_problem_of_an_adapter(adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-9])
    assert codes(adapter) == ["damaged"]
    (adapter / WEIGHTS).unlink()
    assert codes(adapter) == ["no-weights"]
    (adapter / "adapter_model.bin").write_bytes(b"x")
    [problem] = veneer.inspect(adapter).problems
    assert (problem.code, "veneer convert-pickle" in problem.hint) == ("pickle-only", True)
    (adapter / WEIGHTS).write_bytes(whole)
    edit_tensors(adapter, lambda tensors: {})
    assert codes(adapter) == ["empty-checkpoint"]
    (adapter / WEIGHTS).write_bytes(whole)
    edit_config(adapter, base_model_name_or_path="/home/trainer/models/base")
    [problem] = veneer.inspect(adapter).problems
    assert (problem.code, "/home/trainer/models/base does not exist here" in problem.message) == (
        "base-not-found",
        True,
    )
    assert "base=" in problem.hint
    edit_config(adapter, base_model_name_or_path=None)
    assert codes(adapter) == ["base-not-named"]
    named(adapter, peft_type="SOMETHING")
    assert codes(adapter) == ["unknown-method"]
    named(adapter, peft_type="LORA", use_sorcery=True)
    assert codes(adapter) == ["config"]
    (adapter / CONFIG).write_text("{")
    found = veneer.inspect(adapter)
    assert (found.kind, found.problems[0].code) == ("adapter", "damaged")


def test_each_problem_of_a_model(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    assert codes(base) == ["no-weights"]
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    [problem] = veneer.inspect(base).problems
    assert (problem.code, "model-2.safetensors" in problem.message) == ("missing-shard", True)
    index.unlink()
    (base / "config.json").unlink()
    assert (veneer.inspect(base).kind, codes(base)) == ("unknown", ["no-config"])


def test_folders_that_are_neither(tmp_path: Path) -> None:
    assert codes(tmp_path) == ["empty-folder"]
    (tmp_path / "notes.txt").write_text("x")
    [problem] = veneer.inspect(tmp_path).problems
    assert (problem.code, "notes.txt" in problem.hint) == ("no-checkpoint", True)
    run = tmp_path / "run"
    shutil.copytree(named(saved(tmp_path / "adapter")), run / "checkpoint-50")
    [problem] = veneer.inspect(run).problems
    assert (problem.code, "checkpoint-50" in problem.hint) == ("trainer-output", True)
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(tmp_path / "adapter" / WEIGHTS, lone)
    assert codes(lone) == ["no-config"]


def test_it_is_json_and_a_panel(adapter: Path) -> None:
    found = veneer.inspect(adapter)
    assert json.loads(json.dumps(found.to_dict()))["adapter"]["peft_type"] == "LORA"
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    for words in ("adapter", "LORA for CAUSAL_LM", "owner/base", "2 (3 layers), 4 (3 layers), alpha 12", "use_rslora"):
        assert words in text
