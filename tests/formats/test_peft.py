"""PEFT's layout to the canonical form and back, and the folder for servers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import veneer
from tests.formats.same_changes import assert_same
from tests.models import build
from tests.random_adapters import edit_config, edit_tensors, saved, saved_base
from veneer.base_model.catalog import Catalog
from veneer.cli import main
from veneer.errors import BindError, OutputError, UnsupportedError, UsageError
from veneer.files.source import Source
from veneer.formats import registry
from veneer.formats.base_facts import base_in_memory, base_on_disk
from veneer.formats.format import ReadOptions

MIXED: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
}


def changes(folder: Path) -> dict[str, Tensor]:
    """The change of each weight, read from PEFT's files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        patterns = {"r": config.get("rank_pattern") or {}, "lora_alpha": config.get("alpha_pattern") or {}}
        r, alpha = (
            next((v for k, v in patterns[option].items() if name.endswith(k.replace("\\", ""))), config[option])
            for option in ("r", "lora_alpha")
        )
        assert down.shape[0] == r
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        up = tensors[key.replace("lora_A", "lora_B")]
        result[name] = scale * (up.double() @ down.double())
    return result


def test_the_same_bytes_come_back(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", **MIXED, use_rslora=True)
    report = veneer.convert(adapter, tmp_path / "again")
    assert [step.kind for step in report.steps] == ["exact"]
    assert dict(report._facts())["left out"] == "nothing: the change is exactly the same"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize("options", [{}, MIXED, {**MIXED, "use_rslora": True}, {"lora_alpha": 0}])
def test_a_folder_for_servers_makes_the_same_change(tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = saved(tmp_path / "adapter", **options)
    veneer.convert(adapter, tmp_path / "served", to="serving")
    assert_same(changes(adapter), changes(tmp_path / "served"), rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert isinstance(config["lora_alpha"], int)
    assert not config["use_rslora"]
    assert "rank_pattern" not in config
    assert veneer.check_serving(tmp_path / "served").fits


def test_the_way_back_restores_the_config(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", **MIXED, use_rslora=True)
    veneer.convert(adapter, tmp_path / "served", to="serving")
    veneer.convert(tmp_path / "served", tmp_path / "same")
    assert_same(changes(adapter), changes(tmp_path / "same"), rtol=1e-6, atol=1e-7)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("adapter", "same")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias"), ({"modules_to_save": ["lm_head"]}, "lm_head")],
)
def test_what_a_server_cannot_hold_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    adapter = saved(tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedError, match=named) as caught:
        veneer.convert(adapter, tmp_path / "served", to="serving")
    assert "--as-lora" in str(caught.value) or "veneer merge" in str(caught.value)
    assert not (tmp_path / "served").exists()


def test_another_method_becomes_a_lora_first(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    config = veneer.OFTConfig(oft_block_size=8, target_modules=["q_proj"], init_weights=False)
    veneer.get_peft_model(veneer.load(base).get_base_model(), config, seed=1).save_pretrained(tmp_path / "oft")
    with pytest.raises(UnsupportedError, match="--as-lora"):
        veneer.convert(tmp_path / "oft", tmp_path / "served", to="serving", base=base)
    report = veneer.convert(tmp_path / "oft", tmp_path / "served", to="serving", base=base, as_lora=True, rank=8)
    assert report.steps[0].kind == "approximated"
    assert 0 < report.error < 1


def test_an_alpha_of_zero_is_noted(tmp_path: Path) -> None:
    (note,) = veneer.convert(saved(tmp_path / "adapter", lora_alpha=0), tmp_path / "served", to="serving").notes
    assert "lora_alpha" in note
    assert not veneer.convert(tmp_path / "served", tmp_path / "again").notes


def test_the_command_prints_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(tmp_path / "adapter", **MIXED)
    assert main(["convert", str(adapter), str(tmp_path / "served"), "--to", "serving", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [step["kind"] for step in report["steps"]] == ["exact", "padded", "folded"]
    assert (report["source"], report["to"], report["rank"]) == ("PEFT", "a server of LoRA", 4)
    assert main(["convert", str(adapter), str(tmp_path / "served"), "--to", "serving"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(adapter), str(tmp_path / "again"), "--to", "serving"]) == 0
    assert "the scale multiplied into B" in capsys.readouterr().out


def test_damage_is_named(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    edit_config(adapter, r=2)
    with pytest.raises(BindError, match="of rank 4, and the config says 2"):
        veneer.convert(adapter, tmp_path / "out", to="serving")
    edit_config(adapter, r=4)
    edit_tensors(adapter, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(BindError, match="has no lora_A"):
        veneer.convert(adapter, tmp_path / "out", to="serving")
    assert not (tmp_path / "out").exists()


def test_options_are_checked(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    with pytest.raises(OutputError, match="exists already"):
        veneer.convert(adapter, adapter)
    with pytest.raises(UsageError, match="no format that can be written"):
        veneer.convert(adapter, tmp_path / "out", to="peff")
    with pytest.raises(UsageError, match="--as-lora"):
        veneer.convert(adapter, tmp_path / "out", rank=4)


def test_a_folder_is_recognised(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    found = registry.recognise(Source(adapter, str(adapter)))
    assert found is not None
    assert found.name == "peft"
    assert list(found.read(Source(adapter, str(adapter)), ReadOptions())) == [""]


def test_the_base_of_a_plain_family_is_known_without_transformers(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    adapter = saved(tmp_path / "adapter")
    code = "import sys, veneer; veneer.convert(sys.argv[1], sys.argv[2], to='mlx', base=sys.argv[3]);"
    check = "print([name for name in ('transformers', 'rich') if name in sys.modules])"
    command = [sys.executable, "-c", code + check, str(adapter), str(tmp_path / "mlx"), str(base)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
def test_a_plain_family_has_the_parameters_of_the_model_in_memory(tmp_path: Path, options: dict[str, Any]) -> None:
    import transformers as tf

    config: Any = build("llama").config
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**config.to_dict(), **options}))
    model.save_pretrained(tmp_path / "base")
    on_disk = base_on_disk(Source(tmp_path / "base", "base"))
    in_memory = base_in_memory(Catalog(model))
    assert dict(on_disk.shapes) == dict(in_memory.shapes)
    assert dict(on_disk.tied) == dict(in_memory.tied)
