"""Layers that are asked for other adapters than the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import veneer
from tests.models import inputs, logits
from tests.random_adapters import adapted, config
from veneer.errors import AdapterError, MergeError

X = inputs("llama")


def two(**options: Any) -> Any:
    model = adapted(**options)
    model.add_adapter("b", config(**options), seed=2)
    return model.eval()


def layers(model: Any) -> list[Any]:
    return list(model.adapters.adapted_layers)


def under(model: Any, *names: str) -> torch.Tensor:
    """The output with these adapters on all layers."""
    with model.using(names) if names else model.disable_adapter():
        return logits(model, X)


def test_a_layer_that_is_asked_alone_changes_alone() -> None:
    model = two()
    first, *others = layers(model)
    default = logits(model, X)
    first.enable_adapters(False)
    assert (first.disable_adapters, {layer.disable_adapters for layer in others}) == (True, {False})
    without_first = logits(model, X)
    assert not torch.equal(without_first, default)
    first.set_adapter("b")
    assert torch.equal(logits(model, X), without_first)
    first.enable_adapters(True)
    assert (first.active_adapters, others[0].active_adapters) == (["b"], ["default"])
    mixed = logits(model, X)
    assert not torch.equal(mixed, without_first)
    first.set_adapter("default")
    assert torch.equal(logits(model, X), default)
    assert not model.adapters.active_selection.default.by_layer
    # What the layers have is what the model's forward pass computes.
    first.set_adapter("b")
    zeroed = copy.deepcopy(model)
    zeroed.set_adapter(["default", "b"])
    with torch.no_grad():
        for layer in layers(zeroed):
            away = "default" if layer is layers(zeroed)[0] else "b"
            for share in layer.bound[away]:
                for tensor in layer.tensors(away, share).values():
                    tensor.zero_()
    assert torch.allclose(logits(zeroed, X), mixed, atol=1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_what_its_layers_were_asked_for(again: Any) -> None:
    model = two()
    layers(model)[0].set_adapter("b")
    expected = logits(model, X)
    copied = again(model)
    assert torch.equal(logits(copied, X), expected)
    layers(copied)[0].enable_adapters(False)
    assert torch.equal(logits(model, X), expected)
    assert not torch.equal(logits(copied, X), expected)


def test_what_all_layers_are_asked_for_is_the_model_s_selection() -> None:
    model = two(modules_to_save=["lm_head"])
    expected = under(model, "b")
    for module in [*layers(model), model.get_base_model().lm_head]:
        assert model.active_adapters == ["default"]
        module.set_adapter("b")
    assert model.active_adapters == ["b"]
    assert not model.adapters.active_selection.default.by_layer
    assert torch.equal(logits(model, X), expected)
    for module in [*layers(model), model.get_base_model().lm_head]:
        module.enable_adapters(False)
    assert not model.adapters.active_selection.enabled
    assert torch.equal(logits(model, X), under(model))
    layers(model)[1].enable_adapters(True)
    assert [layer.disable_adapters for layer in layers(model)[:3]] == [True, False, True]
    model.enable_adapters()
    assert torch.equal(logits(model, X), expected)


def test_a_choice_of_the_model_is_one_for_all_layers() -> None:
    model = two()
    expected = under(model, "b")
    layers(model)[0].set_adapter("b")
    layers(model)[1].enable_adapters(False)
    irregular = logits(model, X)
    assert torch.equal(under(model, "b"), expected)
    with model.disable_adapter():
        assert {layer.disable_adapters for layer in layers(model)} == {True}
    assert torch.equal(logits(model, X), irregular)
    model.set_adapter("b")
    assert torch.equal(logits(model, X), expected)
    assert {layer.disable_adapters for layer in layers(model)} == {False}


def test_a_call_keeps_what_its_layers_had_when_it_began() -> None:
    model = two()
    expected, last = logits(model, X), layers(model)[-1]
    first = layers(model)[0]
    hook = first.register_forward_hook(lambda *_: last.enable_adapters(False))
    assert torch.equal(logits(model, X), expected)
    hook.remove()
    assert not torch.equal(logits(model, X), expected)


def test_renaming_and_deleting_reach_the_layers() -> None:
    model = two()
    first = layers(model)[0]
    first.set_adapter("b")
    expected = logits(model, X)
    model.adapters.rename("b", "c")
    assert first.active_adapters == ["c"]
    assert torch.equal(logits(model, X), expected)
    model.delete_adapter("c")
    assert first.active_adapters == []
    first.enable_adapters(False)
    disabled = logits(model, X)
    first.enable_adapters(True)
    assert torch.equal(logits(model, X), disabled)


def test_gradients_are_those_of_the_layer() -> None:
    model = two()
    first, second = layers(model)[:2]
    first.set_adapter("b")
    assert [p.requires_grad for name in ("default", "b") for p in first.trained(name)] == [False, False, True, True]
    assert all(p.requires_grad for p in second.trained("default"))
    second.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in second.trained("default"))
    assert all(p.requires_grad for p in layers(model)[2].trained("default"))
    model.train()(**X, labels=X["input_ids"]).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_adapter("default")
    assert all(p.requires_grad for p in [*first.trained("default"), *second.trained("default")])


def test_status_tells_that_layers_differ() -> None:
    model = two()
    first = layers(model)[0]
    first.enable_adapters(False)
    assert [status.enabled for status in model.get_layer_status()][:2] == [False, True]
    assert model.get_model_status().enabled == "irregular"
    first.enable_adapters(True)
    first._active_adapter = "b"
    assert first._active_adapter == ["b"]
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters) == (True, "irregular")
    assert [status.active_adapters for status in model.get_layer_status()][:2] == [["b"], ["default"]]


def test_one_selection_is_merged() -> None:
    model = two()
    layers(model)[0].set_adapter("b")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="1 layers have other adapters active than the model"):
            merge()
    expected = under(model, "b")
    model.merge_adapter(["b"])
    assert torch.allclose(logits(model, X), expected, atol=1e-5)


def test_what_cannot_be_active_together_is_refused_on_a_layer() -> None:
    model = two(modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="both bring lm_head whole"):
        layers(model)[0].set_adapter(["default", "b"])
    layers(model)[0].set_adapter(["nothing"])
    assert layers(model)[0].active_adapters == ["nothing"]
    assert veneer.get_layer_status(model)[0].active_adapters == ["nothing"]


def test_a_new_adapter_changes_nothing_of_others() -> None:
    model = two()
    first = layers(model)[0]
    first.set_adapter("b")
    model.set_requires_grad("b", True)
    expected = logits(model, X)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter("c", config())
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == {**dict.fromkeys(after, False), **before}
    assert torch.equal(logits(model, X), expected)
