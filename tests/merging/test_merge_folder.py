"""The arithmetic of a merge, and merging from folder to folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, saved, saved_base
from veneer.base_model.sites.linear import LinearSite
from veneer.errors import MergeError
from veneer.patches.patch import Patch, apply
from veneer.patches.weight_arithmetic import BLOCK, merged


def random_patch(out: int, inner: int, r: int, seed: int, dtype: torch.dtype = torch.float32) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, r, generator=generator), torch.randn(r, inner, generator=generator)
    return Patch(up=up.to(dtype), down=down.to(dtype), scale=0.37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_sum_is_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    out, inner = BLOCK + 13, 40
    stored = torch.randn(inner, out) if transposed else torch.randn(out, inner)
    weight = (stored.T if transposed else stored).to(dtype)
    before = weight.clone()
    patches = [random_patch(out, inner, 4, 1, torch.bfloat16), random_patch(out, inner, 7, 2)]
    exact = weight.double()
    for patch in patches:
        exact = exact + patch.scale * patch.up.double() @ patch.down.double()
    result = merged(weight, patches)
    assert torch.equal(weight, before)
    assert (result.dtype, result.stride()) == (dtype, weight.stride())
    if dtype == torch.float32:
        assert gap(result, exact) < 1e-6
        return
    # Half a unit in the last place, and float32's own error.
    half = torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((result.double() - exact).abs() <= half * 1.001 + 5e-6).all())
    assert (result == exact.to(dtype)).double().mean() > 0.99


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_unmerged_equals_merged(count: int, inner: int, r: int, seed: int) -> None:
    out, generator = 17, torch.Generator().manual_seed(seed)
    weight, x = torch.randn(out, inner, generator=generator), torch.randn(5, inner, generator=generator)
    patches = [random_patch(out, inner, r, seed + i) for i in range(count)]
    layer = torch.nn.Linear(inner, out, bias=False)
    unmerged = apply(LinearSite("layer", layer), None, lambda x: x @ weight.T, patches, False, x)
    assert torch.allclose(x @ merged(weight, patches).T, unmerged, atol=1e-4, rtol=1e-4)


def test_a_patch_knows_whether_it_changes_anything() -> None:
    patch = random_patch(4, 5, 2, 0)
    assert patch.changes()
    assert not Patch(up=patch.up * 0, down=patch.down, scale=1.0).changes()
    assert not Patch(up=patch.up, down=patch.down, scale=0.0).changes()


def test_the_folder_is_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, adapter = saved_base(tmp_path / "base"), saved(tmp_path / "adapter")
    (base / "chat_template.jinja").write_text("base")
    (base / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("own")
    (adapter / "README.md").write_text("about the adapter")
    steps: list[str] = []
    report = veneer.merge(adapter, base, out=tmp_path / "out", on_step=steps.append)
    assert steps == ["loading", "merging", "writing"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == set(report.files) > {"config.json", "model.safetensors", "tokenizer.json"}
    assert "README.md" not in files
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "own"
    assert not [name for name in files if name.startswith("adapter")]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert gap(logits(plain, inputs("llama")), logits(adapted(), inputs("llama"))) < 1e-5
    names = set(plain.state_dict())
    assert names == set(build("llama").state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    assert json.loads(json.dumps(report.to_dict()))["saved_modules"] == []


def test_the_dtype_is_as_asked(tmp_path: Path) -> None:
    base, adapter = saved_base(tmp_path / "base"), saved(tmp_path / "adapter")
    report = veneer.merge(adapter, base, out=tmp_path / "out", dtype=torch.bfloat16)
    assert report.dtype == "bfloat16"
    assert veneer.inspect(tmp_path / "out").model.weights.dtypes.keys() == {"BF16"}  # type: ignore[union-attr]


def test_what_is_there_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    base, adapter, out = saved_base(tmp_path / "base"), saved(tmp_path / "adapter"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match="is not empty"):
        veneer.merge(adapter, base, out=out)
    with pytest.raises(MergeError, match="something other than a plain model"):
        veneer.merge(adapter, base, out=out, overwrite=True)
    with pytest.raises(MergeError, match="is a file"):
        veneer.merge(adapter, base, out=out / "mine.txt")
    with pytest.raises(MergeError, match="something other than a plain model"):
        veneer.merge(adapter, base, out=adapter, overwrite=True)
    with pytest.raises(MergeError, match="is the base itself"):
        veneer.merge(adapter, base, out=base, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    veneer.merge(adapter, base, out=tmp_path / "new")
    before = (tmp_path / "new" / "model.safetensors").read_bytes()
    other = saved(tmp_path / "other", seed=5)
    veneer.merge(other, base, out=tmp_path / "new", overwrite=True)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() != before


def test_nothing_is_left_of_a_merge_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = saved_base(tmp_path / "base"), saved(tmp_path / "adapter")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("veneer.merging.output.write_folder.shutil.copyfile", fail)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(MergeError, match="disk full"):
        veneer.merge(adapter, base, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_there_must_be_something_to_merge(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    with pytest.raises(MergeError, match="nothing to merge"):
        veneer.merge(base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_comes_along(tmp_path: Path) -> None:
    base, adapter = saved_base(tmp_path / "base", "bert"), saved(tmp_path / "adapter", "bert")
    expected = logits(adapted("bert"), inputs("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = veneer.merge(adapter, base, out=tmp_path / "out")
    assert report.saved_modules == ["classifier"]
    assert gap(logits(veneer.load(tmp_path / "out"), inputs("bert")), expected) < 1e-5
