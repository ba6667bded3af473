"""What is at a path: told for what is whole, and for what is broken."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

import veneer
from tests.models import CASES, build
from tests.random_adapters import (
    CONFIG,
    WEIGHTS,
    adapted,
    config,
    edit_config,
    edit_tensors,
    enlarge,
    saved,
    saved_base,
)
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


@pytest.mark.parametrize(
    ("made", "layers"),
    [
        (veneer.ShadowConfig(task_type="CAUSAL_LM"), 2),
        (veneer.LoHaConfig(target_modules=["q_proj", "down_proj"]), 4),
        (veneer.AdaLoraConfig(target_modules=["q_proj"], total_step=10), 2),
        (veneer.VeraConfig(target_modules=["q_proj", "v_proj"]), 4),
        (veneer.LNTuningConfig(), 5),
        (veneer.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"), 1),
        (veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), 0),
    ],
    ids=lambda value: str(getattr(value, "peft_type", "")),
)
def test_what_an_adapter_of_any_method_sits_on_is_counted(made: Any, layers: int, tmp_path: Path) -> None:
    veneer.get_peft_model(build("llama"), made).save_pretrained(tmp_path)
    found = veneer.inspect(tmp_path)
    assert found.adapter is not None
    assert found.adapter.layers == layers
    assert (f"{layers} adapted" in panel(found)) == (layers > 0)


def test_every_methods_tensors_are_told_by_their_names() -> None:
    from tests.methods.document import names
    from veneer.checkpoints.inspection.inspect_path import _layers
    from veneer.files.safetensors_header import TensorInfo

    for name in names():
        method = importlib.import_module(f"veneer.methods.{name.lower()}").METHOD
        tensors = [
            TensorInfo(f"base_model.model.a.{leaf}", "F32", (1,), 0, 4) for leaf in getattr(method, "disk_names", ())
        ]
        assert _layers(name, tensors) == bool(tensors), name


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
    assert facts.target_modules == sorted(CASES["llama"].targets)
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


@pytest.mark.parametrize(
    ("key", "written_by"),
    [
        ("unet.mid.to_q.lora_A.weight", "diffusers"),
        ("mid.to_q.lora_A.weight", "diffusers"),
        ("lora_unet_mid_to_q.lora_down.weight", "kohya"),
    ],
)
def test_a_lora_of_diffusers_is_told_apart(key: str, written_by: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        found = veneer.inspect(path)
        assert (found.kind, found.adapter.ranks, found.problems) == ("adapter", {2: 1}, ())
        assert (found.adapter.format, found.adapter.peft_type) == (written_by, "LORA")


def test_a_healthy_report_tells_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = saved_base(tmp_path / "base"), saved(tmp_path / "my adapter")
    (weights,) = base.glob("*.safetensors")
    edit_config(folder, base_model_name_or_path="../base")
    size, own = weights.stat().st_size, veneer.inspect(folder).adapter.weights.nbytes
    found = veneer.inspect(folder)
    assert (found.memory, found.next_command) == (size + own, f"veneer generate '{folder}' --prompt \"Hello\"")
    assert veneer.inspect(base).next_command == f'veneer generate {base} --prompt "Hello"'
    assert veneer.inspect(tmp_path, subfolder="my adapter").next_command == found.next_command
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    named(folder)
    assert (veneer.inspect(folder).memory, "not on this machine" in panel_of(folder)) == (None, True)
    cached = tmp_path / "hub" / "models--owner--base"
    shutil.copytree(base, cached / "snapshots" / "c0ffee")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    assert veneer.inspect(folder).memory == size + own
    assert "veneer generate" in panel_of(folder)
    edit_config(folder, revision="/dev/zero")
    assert veneer.inspect(folder).memory is None
    edit_config(folder, task_type="SEQ_CLS")
    assert veneer.inspect(folder).next_command is None
    (folder / WEIGHTS).unlink()
    assert (veneer.inspect(folder).memory, veneer.inspect(folder).next_command) == (None, None)


def panel_of(path: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(veneer.inspect(path))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_it_is_json_and_a_panel(adapter: Path) -> None:
    found = veneer.inspect(adapter)
    assert json.loads(json.dumps(found.to_dict()))["adapter"]["peft_type"] == "LORA"
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    for words in ("adapter", "LORA for CAUSAL_LM", "owner/base", "2 (3 layers), 4 (3 layers), alpha 12", "use_rslora"):
        assert words in text


def panel(found: veneer.Inspection, width: int = 100) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(found)
    return console.export_text()


def test_the_panel_of_a_model(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    values |= {"quantization_config": {"quant_method": "gptq", "bits": 4}, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(values))
    found = veneer.inspect(base)
    assert found.model is not None
    assert found.model.weights is not None
    text = " ".join(panel(found).split())
    size = (base / "model.safetensors").stat().st_size
    assert found.model.weights.nbytes < size < 1.1 * found.model.weights.nbytes
    for words in (
        "full model",
        "LlamaForCausalLM (llama)",
        "quantised gptq",
        "embeddings tied",
        f"{found.model.weights.parameters:,} parameters in {found.model.weights.tensors} tensors, F32",
        "in 1 file",
    ):
        assert words in text


def test_the_panel_of_a_set_and_its_problems(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("french", config(r=2))
    model.save_pretrained(tmp_path)
    named(tmp_path)
    edit_config(tmp_path / "french", base_model_name_or_path="/gone/base")
    text = " ".join(panel(veneer.inspect(tmp_path)).replace("│", " ").split())
    for words in ("set of adapters", "in french/ LORA, rank 2, 6 layers", "french: The base model /gone/base does not"):
        assert words in text
    assert "base=" in text


def test_dtypes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.zeros(1000, dtype=torch.bfloat16), "b": torch.zeros(3), "c": torch.zeros(2, 2).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = veneer.inspect(tmp_path)
    assert found.model is not None
    assert found.model.weights is not None
    assert (found.model.weights.dtypes, found.model.weights.nbytes) == ({"BF16": 1004, "F32": 3}, 2020)
    assert "BF16 (1,004 values), F32 (3 values), 2.0 kB" in panel(found)


def test_shards_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        save_file({name: torch.zeros(5)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: f"{name}.safetensors" for name in ("a", "b")}})
    )
    facts = veneer.inspect(tmp_path).model
    assert facts is not None
    assert facts.weights is not None
    assert (facts.weights.files, facts.weights.tensors, facts.weights.nbytes) == (
        ["a.safetensors", "b.safetensors"],
        2,
        40,
    )
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert codes(tmp_path) == ["damaged"]


def test_a_config_cannot_steer_the_terminal(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="/x\x1b[2J[red]\ud800", **{"use_[/]": True})
    text = panel(veneer.inspect(adapter))
    assert "\x1b" not in text
    assert r"/x\x1b[2J[red]\ud800" in text
    assert "use_[/]" in text
    text.encode()


def test_a_member_whose_name_is_markup(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("[red]", config(r=2))
    model.save_pretrained(tmp_path)
    assert "in [red]/" in panel(veneer.inspect(tmp_path))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_alpha_that_is_no_number(adapter: Path, alpha: str) -> None:
    edit_config(adapter, lora_alpha="ALPHA")
    path = adapter / CONFIG
    path.write_text(path.read_text().replace('"ALPHA"', alpha))
    found = veneer.inspect(adapter)
    assert any(p.code == "config" and "lora_alpha" in p.message for p in found.problems)
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_alpha_beyond_all_floats(adapter: Path) -> None:
    edit_config(adapter, lora_alpha=10**400)
    assert "alpha" in panel(veneer.inspect(adapter))


def test_a_set_is_not_searched_for_sets(adapter: Path) -> None:
    (adapter / "one").symlink_to(".")
    (adapter / "two").symlink_to(".")
    found = veneer.inspect(adapter)
    assert list(found.adapters) == ["one", "two"]
    assert all(member.adapters == {} for member in found.adapters.values())


def test_a_damaged_set_file_is_a_problem(adapter: Path) -> None:
    (adapter / "adapter_set.json").write_text("[]")
    found = veneer.inspect(adapter)
    assert (found.kind, [p.code for p in found.problems]) == ("adapter", ["damaged"])
    assert "adapter_set.json" in found.problems[0].message


@pytest.mark.parametrize("kind", ["adapter_config.json", "config.json"])
def test_a_trainers_folder_names_its_last_step(tmp_path: Path, kind: str) -> None:
    for step in (500, 1000, 90):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / kind).write_text("{}")
    [problem] = veneer.inspect(tmp_path).problems
    assert problem.code == "trainer-output"
    assert "checkpoint-90, checkpoint-500, checkpoint-1000" in problem.message
    assert problem.hint == f"Choose one, such as {tmp_path}/checkpoint-1000."


def test_a_folder_of_models(tmp_path: Path) -> None:
    for name in ("v1.0", "v1.5", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    [problem] = veneer.inspect(tmp_path).problems
    assert (problem.code, problem.hint) == ("in-subfolder", f"Choose one, such as {tmp_path}/v1.5.")
    assert problem.message.endswith("checkpoints in its folders: v1.0, v1.5.")


def test_an_adapter_with_earlier_states_below_it(adapter: Path) -> None:
    shutil.copytree(adapter, adapter / "checkpoint-50")
    found = veneer.inspect(adapter)
    assert (found.kind, found.adapters, found.problems) == ("adapter", {}, ())


def test_what_zero_3_leaves(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {name: torch.zeros(0) for name in tensors})
    [problem] = veneer.inspect(adapter).problems
    assert (problem.code, "ZeRO-3" in problem.hint) == ("empty-checkpoint", True)
    save_file({}, adapter / WEIGHTS, metadata={"format": "pt"})
    assert (adapter / WEIGHTS).stat().st_size == 40
    [problem] = veneer.inspect(adapter).problems
    assert (problem.code, problem.message) == (
        "empty-checkpoint",
        f"{adapter}: empty checkpoint: {WEIGHTS} holds no values.",
    )


@pytest.mark.parametrize(
    "place", [lambda folder: "base", lambda folder: str(folder / "base"), lambda folder: "../base"]
)
def test_a_base_that_is_there_is_no_problem(adapter: Path, place: Any) -> None:
    saved_base(adapter / "base")
    saved_base(adapter.parent / "base")
    edit_config(adapter, base_model_name_or_path=place(adapter))
    assert [code for code in codes(adapter) if code.startswith("base")] == []


def test_the_documentation_has_a_line_for_each_problem() -> None:
    root = Path(__file__).parents[2]
    source = "".join(path.read_text() for path in (root / "src/veneer/checkpoints/inspection").glob("*.py"))
    page = (root / "docs/inspect.md").read_text().partition("## Problems")[2]
    documented = set(re.findall(r"^\| `([a-z-]+)` \| [^`]", page, re.MULTILINE)) - {"code"}
    named = set(re.findall(r'roblem(?:_of)?\(\s*"([a-z-]+)"', source))
    assert documented >= named
    assert [code for code in documented if f'"{code}"' not in source] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LORA_KEYS = ["r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "use_rslora", "use_other", "bias"]
ADAPTER_KEYS = st.sampled_from(["peft_type", "base_model_name_or_path", "revision", "task_type", *LORA_KEYS])
MODEL_KEYS = st.sampled_from(
    ["architectures", "model_type", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings"]
)
ANY_FILE = {
    CONFIG: st.dictionaries(ADAPTER_KEYS, JSON, max_size=6),
    "config.json": st.dictionaries(MODEL_KEYS, JSON, max_size=4),
    "adapter_set.json": JSON | st.fixed_dictionaries({"adapters": JSON, "active": JSON}),
    "model.safetensors.index.json": JSON | st.fixed_dictionaries({"weight_map": JSON}),
}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.fixed_dictionaries({}, optional=ANY_FILE))
def test_no_content_of_its_files_makes_it_fail(tmp_path: Path, contents: dict[str, Any]) -> None:
    for name in ANY_FILE:
        (tmp_path / name).unlink(missing_ok=True)
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = veneer.inspect(tmp_path)
    assert all(problem.message and problem.hint for problem in found.problems)
    json.dumps(found.to_dict())
    panel(found).encode()
