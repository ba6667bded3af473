"""Adapters of other tools in the places where PEFT's are taken: inspecting, loading, merging, converting to a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

import veneer
from tests.checkpoints.test_older_layouts import moe, old_experts
from tests.formats import diffusion_bases as bases
from tests.models import gap, inputs
from tests.models import logits as model_logits
from tests.random_adapters import saved, saved_base
from veneer.errors import BaseModelError, NotACheckpointError, UsageError
from veneer.formats import registry

NAMES = [name for name in ("serving", "mlx", "gguf") if name in registry.targets()]
MIXED: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}


def logits(model: veneer.PeftModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs("llama")).logits
        return result


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


@pytest.fixture(params=NAMES)
def other(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    """The adapter in another tool's format."""
    name = str(request.param)
    out = tmp_path / ("out.gguf" if name == "gguf" else "out")
    veneer.convert(saved(tmp_path / "adapter", **MIXED), out, to=name, base=base)
    return out


def test_loading(other: Path, base: Path, tmp_path: Path) -> None:
    expected = logits(veneer.load(tmp_path / "adapter", base=base))
    model = veneer.load(other, base=base)
    torch.testing.assert_close(logits(model), expected)
    model.load_adapter(other, "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), expected)
    in_memory = veneer.load(base).get_base_model()
    torch.testing.assert_close(logits(veneer.load(other, base=in_memory)), expected)


def test_merging(other: Path, base: Path, tmp_path: Path) -> None:
    (other.parent / "notes.json").write_text("{}")
    veneer.merge(tmp_path / "adapter", base, out=tmp_path / "merged")
    veneer.merge(other, base, out=tmp_path / "same")
    torch.testing.assert_close(logits(veneer.load(tmp_path / "same")), logits(veneer.load(tmp_path / "merged")))
    assert not (tmp_path / "same" / "notes.json").exists()
    assert veneer.verify(tmp_path / "same", base=base).passed


def test_inspecting(other: Path) -> None:
    facts = veneer.inspect(other).adapter
    assert facts is not None
    assert veneer.inspect(other).kind == "adapter"
    assert facts.weights is not None
    assert facts.ranks
    assert facts.layers
    assert facts.weights.parameters


def test_making_a_lora_of_it(other: Path, base: Path, tmp_path: Path) -> None:
    report = veneer.convert(other, tmp_path / "lora", base=base, as_lora=True)
    expected = logits(veneer.load(tmp_path / "adapter", base=base))
    torch.testing.assert_close(logits(veneer.load(tmp_path / "lora", base=base)), expected)
    assert report.error < 1e-5


def test_a_file_that_needs_a_base_says_so(tmp_path: Path) -> None:
    unet = bases.stored(tmp_path / "unet", bases.unet())
    adapter = bases.lora(tmp_path / "adapter", {"mid_block.attentions.0.proj_in": (8, 8, 1, 1)})
    veneer.convert(adapter, tmp_path / "x.safetensors", to="kohya", base=unet)
    with pytest.raises(BaseModelError, match="--base"):
        veneer.load(tmp_path / "x.safetensors")
    assert veneer.inspect(tmp_path / "x.safetensors").adapter is not None


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    for call in (veneer.load, veneer.inspect):
        with pytest.raises(NotACheckpointError, match="no adapter in a format that is known"):
            call(tmp_path / "x.npz")
    with pytest.raises(NotACheckpointError, match="is a full model, not an adapter"):
        veneer.convert(saved_base(tmp_path / "base"), tmp_path / "out")
    saved(tmp_path / "set" / "one")
    with pytest.raises(NotACheckpointError, match=r"is a set of adapters.*set/one"):
        veneer.convert(tmp_path / "set", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match="neither a model"):
        veneer.convert(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("name", ["gguf", "mlx"])
def test_an_adapter_of_an_older_version_is_written_by_the_names_of_now(name: str, tmp_path: Path) -> None:
    by_hand = moe("mixtral")
    folder = old_experts("mixtral", by_hand, ("w1", "w2", "w3"), (0, 1, 2)).save(tmp_path / "old")
    base = moe("mixtral")
    base.save_pretrained(tmp_path / "base")
    out = tmp_path / ("out.gguf" if name == "gguf" else "out")
    report = veneer.convert(folder, out, to=name, base=tmp_path / "base")
    assert any("experts" in note for note in report.notes)
    model = veneer.load(out, base=tmp_path / "base")
    assert gap(model_logits(model, inputs("llama")), model_logits(by_hand, inputs("llama"))) < 1e-5


def test_options_that_decide_are_checked(base: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    for option in ("experts", "scaling"):
        with pytest.raises(UsageError, match=f"{option}='odd' is no choice"):
            veneer.convert(adapter, tmp_path / "out", **{option: "odd"})


def test_a_config_that_travelled_for_other_modules_is_left(tmp_path: Path, base: Path) -> None:
    if "mlx" not in NAMES:
        pytest.skip("MLX-LM's format is not there")
    from safetensors.torch import load_file, save_file

    veneer.convert(saved(tmp_path / "adapter", **MIXED), tmp_path / "mlx", to="mlx", base=base)
    weights = tmp_path / "mlx" / "adapters.safetensors"
    tensors = {key: tensor for key, tensor in load_file(weights).items() if "layers.1." not in key}
    save_file(tensors, weights)
    veneer.convert(tmp_path / "mlx", tmp_path / "fewer", base=base)
    config = json.loads((tmp_path / "fewer" / "adapter_config.json").read_text())
    assert all("layers.0." in target for target in config["target_modules"])


def test_a_base_on_the_hub_gives_its_config_and_no_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns)
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    veneer.convert(saved(tmp_path / "adapter"), tmp_path / "out", to="mlx", base="owner/name")
    assert asked
    assert not [patterns for patterns in asked if "*.safetensors" in patterns]
