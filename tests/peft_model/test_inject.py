"""Adapters in a base model that no PeftModel is around, handled layer by layer as diffusers does."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from tests.models import build, inputs, logits
from veneer.errors import AdapterError
from veneer.layers.base_tuner_layer import BaseTunerLayer
from veneer.peft_model.adapted_model import injected_in
from veneer.peft_model.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict

X = inputs("llama")


def config(library: Any = veneer, kind: str = "LoraConfig", **options: Any) -> Any:
    chosen = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    return getattr(library, kind)(**{**chosen, **options})


def injected(name: str = "a", library: Any = veneer, model: Any = None, **options: Any) -> Any:
    model = library.inject_adapter_in_model(config(library, **options), model or build("llama"), name)
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in sorted(model.named_parameters()):
        if f".{name}." in key or key.endswith(f".{name}"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def layers(model: nn.Module, kind: type = BaseTunerLayer) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def take_out(model: Any) -> None:
    """Take out all layers with adapters, as diffusers' unload_lora_weights does."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config


def test_layers_that_are_taken_out_leave_nothing() -> None:
    model = build("llama")
    base = logits(model, X)
    for _ in range(2):
        injected(model=model)
        parameter = weakref.ref(layers(model)[0].lora_A["a"].weight)
        assert not torch.allclose(logits(model, X), base)
        take_out(model)
        assert torch.equal(logits(model, X), base)
        gc.collect()
        assert parameter() is None
        assert injected_in(model) is None
    assert len(model._forward_pre_hooks) == 1


def test_names_of_other_models_may_be_chosen() -> None:
    ours, theirs = (injected(library=library) for library in (veneer, peft))
    base = logits(build("llama"), X)
    for names in ("b", ["a", "b"], ["a"]):
        for model, kind in ((ours, BaseTunerLayer), (theirs, peft.tuners.tuners_utils.BaseTunerLayer)):
            for layer in layers(model, kind):
                layer.set_adapter(names)
        assert layers(ours)[0].active_adapters == (names if isinstance(names, list) else [names])
        assert torch.allclose(logits(ours, X), logits(theirs, X), atol=1e-5)
        assert torch.equal(logits(ours, X), base) is (names == "b")


def test_a_failed_injection_leaves_the_base_as_it_was() -> None:
    model = build("llama")
    with pytest.raises(veneer.TargetError):
        veneer.inject_adapter_in_model(config(target_modules=["nowhere"]), model)
    assert not hasattr(model, "peft_config")
    assert injected_in(model) is None
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_tensors_have_the_dtype_of_their_layer(dtype: torch.dtype) -> None:
    for library in (peft, veneer):
        model = library.inject_adapter_in_model(config(library), build("llama").to(dtype))
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_the_scale_of_other_methods_can_be_changed(kind: str) -> None:
    models = []
    for library in (peft, veneer):
        model = injected(library=library, kind=kind, alpha=6)
        for layer in [module for module in model.modules() if hasattr(module, "set_scale")]:
            layer.set_scale("a", 2.0)
            layer.scale_layer(0.25)
        models.append(model)
        assert layer.scaling == {"a": 0.75}
        assert layer.r == {"a": 4}
    assert torch.allclose(logits(models[0], X), logits(models[1], X), atol=1e-5)


def test_a_module_of_tensors_can_be_set() -> None:
    model = injected(use_dora=True)
    before = logits(model, X)
    for layer in layers(model):
        layer.lora_magnitude_vector["a"] = layer.lora_magnitude_vector["a"].to("cpu")
    assert torch.equal(logits(model, X), before)
    assert layers(model)[0].adapter_layer_names == ("lora_A", "lora_B", "lora_magnitude_vector")


@pytest.mark.parametrize("prepared", [False, True])
def test_tensors_take_the_place_of_an_adapters(prepared: bool) -> None:
    model, other = injected(lora_alpha=4), injected("other", lora_alpha=10, **({"r": 2} if prepared else {}))
    if prepared:
        veneer.prepare_model_for_compiled_hotswap(model, target_rank=8, config=None)
    tensors = {
        key.replace("_A.", "_A.a.").replace("_B.", "_B.a."): tensor
        for key, tensor in veneer.get_peft_model_state_dict(other, adapter_name="other").items()
    }
    check_hotswap_configs_compatible(model.peft_config["a"], other.peft_config["other"])
    hotswap_adapter_from_state_dict(model, tensors, "a", other.peft_config["other"])
    assert torch.allclose(logits(model, X), logits(other, X), atol=1e-5)
    assert model.peft_config["a"].lora_alpha == 10
    for layer in (*layers(model), *layers(other)):
        layer.set_scale("a" if "a" in layer.lora_A else "other", 0.5)
    assert torch.allclose(logits(model, X), logits(other, X), atol=1e-5)


def test_only_an_adapter_of_the_same_method_can_take_the_place() -> None:
    with pytest.raises(AdapterError, match="Incompatible PEFT types found: LORA and LOHA"):
        check_hotswap_configs_compatible(config(), config(kind="LoHaConfig"))


def test_a_module_that_was_replaced_is_adapted_as_it_is_now() -> None:
    model = injected()
    modules = model._veneer_injected.adapters.catalog.modules
    injected("b", model=model)
    assert model._veneer_injected.adapters.catalog.modules is modules
    head = model.lm_head = nn.Linear(model.config.hidden_size, 5)
    injected("c", model=model, target_modules=["lm_head"])
    assert model.lm_head.get_base_layer() is head
    assert logits(model, X).shape[-1] == 5


def test_parameters_of_a_state_dict_are_adapted_once() -> None:
    chosen = veneer.LoraConfig(target_modules=["v_proj"], target_parameters=["q_proj.weight"], init_lora_weights=False)
    models: list[Any] = [build("llama") for _ in range(2)]
    veneer.inject_adapter_in_model(chosen, models[0])
    tensors = veneer.get_peft_model_state_dict(models[0])
    veneer.inject_adapter_in_model(chosen, models[1], state_dict=tensors)
    veneer.set_peft_model_state_dict(models[1], tensors)
    first, second = (logits(model, inputs("llama")) for model in models)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["VeraConfig", "ShadowConfig"])
def test_tensors_that_layers_share_are_got_and_set(kind: str) -> None:
    options = {
        "VeraConfig": {"target_modules": ["q_proj"], "init_weights": False},
        "ShadowConfig": {"init_weights": False},
    }
    first, second = build("llama"), build("llama")
    for model in (first, second):
        veneer.inject_adapter_in_model(getattr(veneer, kind)(**options[kind]), model)
    made = veneer.set_peft_model_state_dict(second, veneer.get_peft_model_state_dict(first))
    assert (made.missing_keys, made.unexpected_keys) == ([], [])
    assert torch.equal(logits(first, X), logits(second, X))
    assert not torch.equal(logits(first, X), logits(build("llama"), X))
