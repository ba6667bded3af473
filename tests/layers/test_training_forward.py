"""What a layer keeps of a training step is used while nothing has changed, and never after."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.random_adapters import enlarge
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.training_forward import TrainingForward

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def model_of(**options: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6, bias=False))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules=["0", "2"], **options)).train()
    enlarge(model, "default", 2)
    model.set_requires_grad("default")
    return model


def layer_of(model: Any) -> AdaptedLayer:
    return next(module for module in model.modules() if isinstance(module, AdaptedLayer))


def kept(model: Any) -> TrainingForward | None:
    return layer_of(model)._inference_cache.training


def both_ways(model: Any, monkeypatch: pytest.MonkeyPatch, x: Tensor = X) -> None:
    """Compare a step with one for which nothing is kept, output and gradients."""

    def step() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    ours = step()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingForward, "takes", lambda *_: False)
        plain = step()
    assert len(ours) == len(plain) > 1
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_it_is_kept_from_one_step_to_the_next(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(lora_dropout=share)
    model(X)
    first = kept(model)
    assert first is not None
    both_ways(model, monkeypatch)
    model(X)
    assert kept(model) is not None


def test_dropout_is_drawn_anew() -> None:
    model = model_of(lora_dropout=0.5)
    assert not torch.equal(model(X), model(X))


def _replace(model: Any) -> None:
    inner = layer_of(model).lora_B["default"]
    inner.weight = nn.Parameter(inner.weight.detach() * 3)


def _replace_module(model: Any) -> None:
    holder = layer_of(model).lora_A
    other = copy.deepcopy(holder["default"])
    other.weight.data.mul_(2)
    holder._modules["default"] = other


def _replace_base(model: Any) -> None:
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach() * 2, requires_grad=False)


def _step(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def _add(model: Any) -> None:
    model.add_adapter("other", veneer.LoraConfig(r=3, target_modules=["0"]))
    enlarge(model, "other", 7)
    model.set_adapter("other")


def _again(model: Any) -> None:
    _add(model)
    model.delete_adapter("default")
    model.add_adapter("default", veneer.LoraConfig(r=4, target_modules=["0", "2"]))
    enlarge(model, "default", 9)
    model.set_adapter("default")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "a step of an optimizer": _step,
    "the scale": lambda model: layer_of(model).scale_layer(3.0),
    "the scaling": lambda model: layer_of(model).scaling.__setitem__("default", 0.25),
    "a parameter": _replace,
    "a module of the adapter": _replace_module,
    "the base's weight": _replace_base,
    "a hook": lambda model: layer_of(model).base_layer.register_forward_hook(lambda m, a, y: 2 * y),
    "another adapter": _add,
    "another adapter of that name": _again,
    "a frozen A": lambda model: layer_of(model).lora_A["default"].weight.requires_grad_(False),
    "a trained base": lambda model: layer_of(model).base_layer.weight.requires_grad_(True),
    "another dtype": lambda model: model.double(),
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    model(X)
    before = model(X).detach()
    change(model)
    x = X.to(model(X.to(next(model.parameters()).dtype)).dtype)
    if change not in (CHANGES["nothing"], CHANGES["merged and unmerged"], CHANGES["another dtype"]):
        trains = (CHANGES["a frozen A"], CHANGES["a trained base"])
        assert change in trains or not torch.allclose(model(x), before.to(x.dtype))
    both_ways(model, monkeypatch, x)


def test_disabled_adapters_do_nothing() -> None:
    model = model_of()
    model(X)
    with model.disable_adapter():
        base = model(X)
    assert torch.equal(base, copy.deepcopy(model).unload()(X))
    assert not torch.allclose(model(X), base)


def test_autocast_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype is torch.bfloat16
        both_ways(model, monkeypatch)


def test_a_copy_trains_its_own_adapter() -> None:
    model = model_of()
    model(X)
    other = copy.deepcopy(model)
    _step(other)
    assert not torch.allclose(other(X), model(X))
    other(X).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_kept_of_an_adapter_that_is_gone() -> None:
    model = model_of()
    model(X)
    parameter = weakref.ref(layer_of(model).lora_A["default"].weight)
    _add(model)
    model.delete_adapter("default")
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_patches_go_the_usual_way(options: dict[str, Any]) -> None:
    model = model_of(**options)
    model(X)
    assert kept(model) is None
