"""Any adapter as a plain LoRA, and what error that leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import enlarge, saved, saved_base
from veneer.cli.app import run
from veneer.errors import AdapterError, BaseModelError, ConfigError, MergeError, UnsupportedError

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}


def _model(config: Any) -> veneer.PeftModel:
    model = veneer.get_peft_model(build("llama"), config, seed=1).eval()
    enlarge(model, "default")
    return model


def _read(folder: Path) -> torch.Tensor:
    model = veneer.PeftModel.from_pretrained(build("llama"), folder)
    assert isinstance(model.peft_config["default"], veneer.LoraConfig)
    return logits(model, inputs("llama"))


@pytest.mark.parametrize(
    "config",
    [
        veneer.VeraConfig(r=5, **TARGETS),
        veneer.GraloraConfig(r=4, **TARGETS),
        veneer.DeftConfig(r=3, **TARGETS),
        veneer.TinyLoraConfig(u=8, **TARGETS),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_a_low_rank_change_is_exact(config: Any, tmp_path: Path) -> None:
    model = _model(config)
    report = veneer.convert_to_lora(model, out=tmp_path / "lora")
    assert report.method == str(config.peft_type)
    assert report.error < 1e-6
    assert dict(report._facts())["left out"] == "nothing but rounding: the LoRA makes the same change"
    expected = logits(model, inputs("llama"))
    with model.disable_adapter():
        assert gap(logits(model, inputs("llama")), expected) > 0.02
    assert gap(_read(tmp_path / "lora"), expected) < 1e-5


def test_another_change_is_approached_and_the_error_said(tmp_path: Path) -> None:
    model = _model(veneer.IA3Config(feedforward_modules=["down_proj"], **TARGETS))
    with pytest.raises(UnsupportedError, match="no low rank of its own"):
        veneer.convert_to_lora(model, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    few, all_of_it = (veneer.convert_to_lora(model, out=tmp_path / str(rank), rank=rank) for rank in (4, 32))
    assert 0.05 < few.error < 1
    assert all_of_it.error < 1e-5
    assert f"{few.error:.2%} of the change" in dict(few._facts())["left out"]
    expected = logits(model, inputs("llama"))
    assert gap(_read(tmp_path / "32"), expected) < 1e-4 < gap(_read(tmp_path / "4"), expected)
    layer = model.adapters.layers[few.worst]
    merged, _ = layer.merged_parameters(("default",))
    sizes = torch.linalg.svdvals((merged - layer.base_stored).detach())
    assert few.errors[few.worst] == pytest.approx(float(sizes[4:].norm() / sizes.norm()), rel=1e-3)


def test_from_a_folder_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = saved_base(tmp_path / "base"), saved(tmp_path / "adapter")
    options = ["--base", str(base), "--as-lora", "--json"]
    assert run(["convert", str(adapter), str(tmp_path / "out"), "--rank", "3", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rank"] == 3
    assert 0 < told["error"] < 1
    with pytest.raises(ConfigError, match="no format that can be written"):
        run(["convert", str(adapter), str(tmp_path / "ia3"), "--to", "ia3", *options])
    old = ["convert", str(adapter), str(base), "--out", str(tmp_path / "lora")]
    with pytest.raises(ConfigError, match=f"veneer convert {adapter} {tmp_path / 'lora'} --as-lora --base {base}"):
        run(old)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(AdapterError, match="not empty"):
        veneer.convert_to_lora(_model(veneer.VeraConfig(**TARGETS)), out=tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "why"),
    [
        (veneer.PolyConfig(r=2, n_skills=2, **TARGETS), MergeError, "decides by the input"),
        (veneer.LNTuningConfig(target_modules=["norm"]), UnsupportedError, r"norm.*not supported for \w*Norm layers"),
        (veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), MergeError, "prompt"),
    ],
    ids=lambda value: str(getattr(value, "peft_type", "")),
)
def test_what_no_lora_holds_is_refused_and_nothing_is_written(
    config: Any, error: type[Exception], why: str, tmp_path: Path
) -> None:
    model = veneer.get_peft_model(build("llama"), config, seed=1)
    for rank in (None, 4):
        with pytest.raises(error, match=why):
            veneer.convert_to_lora(model, out=tmp_path / "lora", rank=rank)
    assert not (tmp_path / "lora").exists()


def test_what_a_layers_output_is_moved_by_comes_along(tmp_path: Path) -> None:
    model = _model(veneer.BeftConfig(target_modules=["q_proj", "down_proj"]))
    veneer.convert_to_lora(model, out=tmp_path / "lora", rank=1)
    expected = logits(model, inputs("llama"))
    with model.disable_adapter():
        assert gap(logits(model, inputs("llama")), expected) > 0.02
    assert gap(_read(tmp_path / "lora"), expected) < 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("rank", [6, 0.6, 0.95])
def test_in_memory_as_peft_does(rank: float, tmp_path: Path) -> None:
    model = _model(veneer.LoKrConfig(r=16, decompose_both=True, init_weights=False, **TARGETS))
    model.save_pretrained(tmp_path / "lokr")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "lokr")
    expected_config, expected = peft.convert_to_lora(theirs, rank)
    config, tensors = veneer.convert_to_lora(model, rank)
    assert {key: tensor.shape for key, tensor in tensors.items()} == {key: t.shape for key, t in expected.items()}
    for key in (key for key in tensors if "lora_A" in key):
        change, other = (t[key.replace("lora_A", "lora_B")].float() @ t[key].float() for t in (tensors, expected))
        assert gap(change, other) < 1e-4
    for name in ("r", "lora_alpha"):
        assert getattr(config, name) == getattr(expected_config, name)
    assert {*config.rank_pattern.values()} == {*expected_config.rank_pattern.values()}
    again = veneer.get_peft_model(build("llama"), config).eval()
    assert not veneer.set_peft_model_state_dict(again, tensors).unexpected_keys
    assert not veneer.set_peft_model_state_dict(again, expected).missing_keys
    veneer.save_as_lora(tmp_path / "saved", model, rank)
    assert gap(_read(tmp_path / "saved"), logits(again, inputs("llama"))) < 1e-4
    report = veneer.convert_to_lora(model, rank, out=tmp_path / "reported")
    assert report.rank == max(tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key)
    if isinstance(rank, float):
        assert report.error**2 <= 1 - rank + 1e-5


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, -0.5])
def test_what_is_no_rank_is_refused(rank: float) -> None:
    with pytest.raises(ConfigError, match=rf"^rank={rank} is no rank"):
        veneer.convert_to_lora(_model(veneer.VeraConfig(r=5, **TARGETS)), rank)


def test_a_model_without_adapters_cannot_be_converted() -> None:
    with pytest.raises(BaseModelError, match=r"supports LoRA conversion: .* no model with adapters") as error:
        veneer.convert_to_lora(build("llama"), 4)
    assert isinstance(error.value, TypeError)


def test_in_memory_it_keeps_whole_modules_and_the_dtype() -> None:
    config = veneer.LoKrConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_weights=False)
    model = veneer.get_peft_model(build("llama").bfloat16(), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    model.add_adapter("other", veneer.LoKrConfig(target_modules=["v_proj"]))
    model.set_adapter("other")
    lora, tensors = veneer.convert_to_lora(model, 32)  # the one called default, as in peft
    assert {*lora.modules_to_save} == {"lm_head"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = veneer.get_peft_model(build("llama").bfloat16(), lora, autocast_adapter_dtype=False).eval()
    assert veneer.set_peft_model_state_dict(again, tensors) == ([], [])
    model.set_adapter("default")
    assert gap(logits(again, inputs("llama")), logits(model, inputs("llama"))) < 0.05
    with pytest.warns(veneer.VeneerWarning, match="already a LoRA adapter"):
        veneer.convert_to_lora(again, 4)
