"""What inference keeps of the selections before the last: a switch back fuses nothing again, and nothing is stale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.random_adapters import enlarge
from veneer.layers import adapted_layer, inference_cache

WIDTH = 64
NAMES = ("a", "b", "c", "d", "e", "f")
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> veneer.PeftModel:
    torch.manual_seed(0)
    config = veneer.LoraConfig(target_modules=["0"], r=2)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))
    own = veneer.get_peft_model(base, config, adapter_name="a").eval()
    for name in NAMES[1:]:
        own.add_adapter(name, config)
    for seed, name in enumerate(NAMES):
        enlarge(own, name, seed)
        own.set_requires_grad(name, False)
    return own


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry each time that patches are fused."""
    calls: list[None] = []
    original = adapted_layer.fuse

    def noted(*arguments: Any) -> Any:
        calls.append(None)
        return original(*arguments)

    monkeypatch.setattr(adapted_layer, "fuse", noted)
    return calls


@torch.no_grad()
def output(model: veneer.PeftModel, *names: str) -> Tensor:
    model.base_model.set_adapter(list(names), inference_mode=True)
    result: Tensor = model(X)
    return result


def test_a_switch_back_fuses_nothing(model: veneer.PeftModel, fused: list[None]) -> None:
    selections = [("a",), ("b",), ("a", "b"), ("c",)]
    first = [output(model, *names) for names in selections]
    assert len(fused) == len(selections)
    for _ in range(2):
        for names, expected in zip(selections, first, strict=True):
            assert torch.equal(output(model, *names), expected)
    assert len(fused) == len(selections)
    assert len({tuple(found.flatten().tolist()) for found in first}) == len(selections)


def test_the_last_used_are_kept(model: veneer.PeftModel, fused: list[None]) -> None:
    for name in ("a", "b", "c", "d", "a", "e"):
        output(model, name)
    assert len(fused) == 5
    output(model, "a")
    assert len(fused) == 5
    output(model, "b")
    assert len(fused) == 6


def test_memory_bounds_them(model: veneer.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.get_base_model()[0]
    for name in NAMES:
        output(model, name)
    kept = layer._inference_cache.forwards
    assert len(kept) == inference_cache.KEPT_SELECTIONS
    each = next(iter(kept.values()))[0].nbytes
    assert each == 2 * 2 * WIDTH * 4
    monkeypatch.setattr(inference_cache, "KEPT_PART", layer.site.stored.nbytes // (2 * each))
    output(model, "a")
    assert list(layer._inference_cache.forwards) == [("f",), ("a",)]


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "an adapter, in place": lambda layer: layer.lora_A["a"].weight.detach().mul_(2),
    "an adapter, by its data": lambda layer: layer.lora_B["a"].weight.data.mul_(2),
    "the base's weight": lambda layer: layer.base_layer.weight.detach().mul_(2),
    "the base's bias": lambda layer: layer.base_layer.bias.detach().add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_meanwhile_is_fused_anew(
    model: veneer.PeftModel, change: Callable[[nn.Module], None], fused: list[None]
) -> None:
    before = output(model, "a")
    output(model, "b")
    change(model.get_base_model()[0])
    count = len(fused)
    after = output(model, "a")
    assert len(fused) == count + 1
    assert not torch.allclose(after, before)


def test_what_is_removed_is_not_kept(model: veneer.PeftModel) -> None:
    for name in ("a", "b"):
        output(model, name)
    model.delete_adapter("b")
    assert list(model.get_base_model()[0]._inference_cache.forwards) == [("a",)]


@torch.no_grad()
def test_an_adapter_that_comes_or_goes_leaves_the_others_fused(
    model: veneer.PeftModel, fused: list[None], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, selected_adapters=["f"])
    rows = ["a", "b"]
    alone, mixed = output(model, "a"), model(X, adapter_names=rows)
    count = len(fused)
    model.load_adapter(tmp_path / "f", "new")
    assert torch.equal(model(X, adapter_names=rows), mixed)
    model.delete_adapter("new")
    assert torch.equal(model(X, adapter_names=rows), mixed)
    assert torch.equal(output(model, "a"), alone)
    model.delete_adapter("b")
    assert torch.equal(output(model, "a"), alone)
    model(X, adapter_names=["a", "__base__"])
    assert len(fused) == count
    model.load_adapter(tmp_path / "f", "b")
    assert torch.allclose(model(X, adapter_names=rows)[1], output(model, "b")[1], atol=1e-6)
    assert not torch.allclose(model(X, adapter_names=rows), mixed, atol=1e-3)


def test_weights_that_another_load_replaces_are_fused_anew(model: veneer.PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, selected_adapters=["f"])
    expected = output(model, "f")
    output(model, "b")
    output(model, "a")
    model.load_adapter(tmp_path / "f", "b")
    assert torch.equal(output(model, "b"), expected)
