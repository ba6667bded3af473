"""A merge refuses any value that the output's dtype does not hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.merging.kinds import mixtral
from tests.models import build
from tests.random_adapters import config, edit_tensors, enlarge, saved, saved_base
from veneer.errors import ConfigError, MergeError
from veneer.patches.weight_arithmetic import check_kept

UP = "model.layers.0.mlp.up_proj.weight"
LARGE = 1e5  # beyond float16's 65504


def base_with(folder: Path, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """Make a base with one value in a weight that no adapter changes."""
    saved_base(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors[UP][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("dtype", "value"), [("float16", LARGE), ("bfloat16", 3.4e38), ("float32", 1e300)])
def test_a_tensor_that_is_only_cast(dtype: str, value: float, rounding: str, tmp_path: Path) -> None:
    stored = torch.float64 if value > 1e38 else torch.float32
    base, adapter = base_with(tmp_path / "base", value, stored), saved(tmp_path / "adapter")
    with pytest.raises(MergeError, match=rf"up_proj.weight holds .*{dtype} does not") as caught:
        veneer.merge(adapter, base, out=tmp_path / "out", dtype=dtype, rounding=rounding)
    assert "wider dtype" in str(caught.value.hint)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_what_is_infinite_in_the_base_is_kept(tmp_path: Path) -> None:
    base, adapter = base_with(tmp_path / "base", -math.inf), saved(tmp_path / "adapter")
    veneer.merge(adapter, base, out=tmp_path / "out", dtype="float16")
    assert load_file(tmp_path / "out" / "model.safetensors")[UP][0, 0] == -math.inf


def test_a_module_that_comes_whole(tmp_path: Path) -> None:
    model: Any = build("llama").half()
    model.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", modules_to_save=["lm_head"])
    key = "base_model.model.lm_head.weight"
    edit_tensors(tmp_path / "adapter", lambda t: {**t, key: t[key].index_fill(0, torch.tensor([0]), LARGE)})
    with pytest.raises(MergeError, match=r"lm_head.weight holds 100000.*float16 does not"):
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")
    loaded = veneer.PeftModel.from_pretrained(build("llama").half(), tmp_path / "adapter")
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    with pytest.raises(MergeError, match=r"lm_head.weight holds 100000.*float16 does not"):
        loaded.merge_and_unload(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    wide = loaded.float().merge_and_unload(safe_merge=True)
    assert float(wide.lm_head.weight.max()) == pytest.approx(LARGE)


def test_parameters_that_are_stored_in_several_tensors(tmp_path: Path) -> None:
    mixtral().half().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = veneer.get_peft_model(mixtral(), config(target_modules=["q_proj"], modules_to_save=["experts"]), seed=1)
    enlarge(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    report = veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "right")
    assert report.changed_tensors > 2
    key = next(k for k in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "experts.down_proj" in k)
    edit_tensors(tmp_path / "adapter", lambda t: {**t, key: t[key].index_fill(0, torch.tensor([0]), LARGE)})
    with pytest.raises(MergeError, match=r"experts.down_proj holds 100000.*float16 does not"):
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out")


def test_whole_numbers_are_kept_as_they_are() -> None:
    check_kept(torch.tensor([1, 200]), torch.tensor([1, 200], dtype=torch.uint8), "x")
    with pytest.raises(MergeError, match="x holds 300, which uint8 does not"):
        check_kept(torch.tensor([1, 300]), torch.tensor([1, 300]).to(torch.uint8), "x")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", torch.int8, "int8"])
def test_what_is_no_dtype_of_weights(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        veneer.merge(tmp_path / "adapter", tmp_path / "base", out=tmp_path / "out", dtype=dtype)


def test_an_extracted_adapter(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    tuned: Any = build("llama")
    with torch.no_grad():
        tuned.model.norm.weight[0] = LARGE
        tuned.model.layers[0].mlp.up_proj.weight.add_(1.0)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(MergeError, match=r"norm.weight holds 100000"):
        veneer.extract(tmp_path / "tuned", base, out=tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
