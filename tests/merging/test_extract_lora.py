"""An adapter is extracted from two full checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import saved
from veneer.errors import BaseModelError, ConfigError, MergeError
from veneer.merging.extract_lora import factors


def save(folder: Path, arch: str = "llama", change: Callable[[str, Tensor], None] = lambda name, tensor: None) -> Path:
    model: Any = build(arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_merged_adapter_comes_back(arch: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path / "base", arch), saved(tmp_path / "adapter", arch, r=4)
    veneer.merge(adapter, base, out=tmp_path / "tuned")
    report = veneer.extract(tmp_path / "tuned", base, out=tmp_path / "found", rank=6, energy=0.999999)
    assert set(report.ranks.values()) == {4}
    assert report.error < 1e-3
    model = veneer.load(tmp_path / "found")
    expected = logits(veneer.load(tmp_path / "tuned"), inputs(arch))
    assert gap(logits(model, inputs(arch)), expected) < 1e-4
    assert gap(logits(veneer.load(base), inputs(arch)), expected) > 0.02


def test_what_is_no_matrix_comes_whole(tmp_path: Path) -> None:
    base = save(tmp_path / "base")

    def tune(name: str, tensor: Tensor) -> None:
        if "norm" in name or "embed" in name or "layers.0.mlp" in name:
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.1)

    tuned = save(tmp_path / "tuned", change=tune)
    report = veneer.extract(tuned, base, out=tmp_path / "found", rank=99)
    assert "model.norm" in report.whole
    assert "model.embed_tokens" in report.ranks
    assert report.error < 1e-5
    found = logits(veneer.load(tmp_path / "found"), inputs("llama"))
    assert gap(found, logits(veneer.load(tuned), inputs("llama"))) < 1e-4


def test_the_error_is_what_is_left_out(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    name = "model.layers.1.mlp.down_proj"

    def tune(parameter: str, tensor: Tensor) -> None:
        if parameter.startswith(name):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))

    tuned = save(tmp_path / "tuned", change=tune)
    report = veneer.extract(tuned, base, out=tmp_path / "found", rank=3)
    models: list[nn.Module] = [veneer.load(folder) for folder in (tuned, base)]
    change = models[0].get_submodule(name).weight - models[1].get_submodule(name).weight  # type: ignore[operator]
    values = torch.linalg.svdvals(change.detach().float())
    assert report.ranks == {name: 3}
    assert report.error == pytest.approx(float((values[3:].square().sum() / values.square().sum()).sqrt()), rel=1e-4)
    assert report.layer_errors[name] == report.error


def test_large_weights_are_factored_at_random_and_well() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(1100, 8, generator=generator), torch.randn(8, 1200, generator=generator)
    change = u @ v + 0.01 * torch.randn(1100, 1200, generator=generator)
    up, down = factors(change, 8, None)
    assert up.shape == (1100, 8)
    values = torch.linalg.svdvals(change)
    assert float((change - up @ down).norm()) < 1.001 * float(values[8:].norm())
    assert factors(change, 20, 0.99)[0].shape[1] <= 8


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    with pytest.raises(MergeError, match="differ in no"):
        veneer.extract(base, base, out=tmp_path / "found")
    with pytest.raises(ConfigError, match="rank=0"):
        veneer.extract(base, base, out=tmp_path / "found", rank=0)
    with pytest.raises(ConfigError, match="energy"):
        veneer.extract(base, base, out=tmp_path / "found", energy=1.5)
    model: Any = build("llama")
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(BaseModelError, match="Resize"):
        veneer.extract(tmp_path / "wide", base, out=tmp_path / "found")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(MergeError, match="is not empty"):
        veneer.extract(base, base, out=tmp_path / "mine")
    assert not (tmp_path / "found").exists()


def test_ends_that_are_one_weight_are_both_named(tmp_path: Path) -> None:
    def tune(name: str, tensor: Tensor) -> None:
        if "wte" in name:
            tensor.mul_(2)

    base, tuned = save(tmp_path / "base", "gpt2"), save(tmp_path / "tuned", "gpt2", tune)
    with pytest.raises(MergeError, match=r"^lm_head\.weight and transformer\.wte\.weight are one weight") as caught:
        veneer.extract(tuned, base, out=tmp_path / "found")
    assert "Untie" in str(caught.value.hint)
    assert not (tmp_path / "found").exists()
