"""What peft's tuner and layers answer to, answered by Veneer's: peft_model.base_model.<...>, layer.<...>."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import adapted, bits, config, same_bits, saved
from veneer.errors import BaseModelError, UnknownAdapterError


def both(tmp_path: Path) -> tuple[Any, Any]:
    """The same two adapters on peft's model and on Veneer's."""
    folders = [str(saved(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    models: list[Any] = []
    for library in (peft, veneer):
        model = library.PeftModel.from_pretrained(build("llama"), folders[0])
        model.load_adapter(folders[1], adapter_name="b")
        models.append(model)
    return models[0], models[1]


def test_several_are_made_active_on_the_tuner(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path)
    batch = inputs("llama")
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "b"])
        assert model.base_model.active_adapters == ["default", "b"]
    assert gap(logits(ours, batch), logits(theirs, batch)) < 1e-5
    assert ours.load_report.active == ["default", "b"]


def test_the_tuner_merges_and_takes_off(tmp_path: Path) -> None:
    batch = inputs("llama")
    for model in both(tmp_path):
        expected = logits(model, batch)
        model.base_model.merge_adapter()
        assert gap(logits(model, batch), expected) < 1e-5
        model.base_model.unmerge_adapter()
        model.base_model.delete_adapter("b")
        assert list(model.base_model.peft_config) == list(model.peft_config) == ["default"]
        assert gap(logits(model.base_model.merge_and_unload(), batch), expected) < 1e-5
    before = bits(build("llama"))
    assert same_bits(bits(adapted().base_model.unload()), before)


def test_adapters_are_switched_off_and_on_again(tmp_path: Path) -> None:
    batch = inputs("llama")
    plain = logits(build("llama"), batch)
    for model in both(tmp_path):
        expected = logits(model, batch)
        for face in (model.base_model, model) if isinstance(model, veneer.PeftModel) else (model.base_model,):
            face.disable_adapter_layers()
            assert gap(logits(model, batch), plain) < 1e-6
            face.enable_adapter_layers()
            assert torch.equal(logits(model, batch), expected)


def test_both_say_the_same_of_themselves(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path)
    for name in ("base_model_torch_dtype", "targeted_module_names", "has_active_enabled_adapter", "active_adapter"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.peft_type == theirs.peft_type.value == "LORA"
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names
    assert ours.modules_to_save is None
    model: Any = adapted(modules_to_save=["lm_head"])
    assert model.modules_to_save == {"lm_head"}
    assert veneer.PeftModel(build("llama")).peft_type is None


def test_a_tuner_that_is_copied_answers_for_its_own_model() -> None:
    model = adapted()
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, loaded):
        other.base_model.add_adapter("second", config())
        assert list(other.base_model.peft_config) == list(other.peft_config) == ["default", "second"]
    assert list(model.base_model.peft_config) == ["default"]


def test_a_tuner_that_outlives_its_model_says_so() -> None:
    tuner = adapted().base_model
    gc.collect()
    with pytest.raises(BaseModelError, match="The PeftModel that set_adapter is asked of is gone"):
        tuner.set_adapter("default")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_change_of_a_weight_is_pefts(arch: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, arch, lora_alpha=3)
    theirs = peft.PeftModel.from_pretrained(build(arch), str(folder))
    ours = veneer.PeftModel.from_pretrained(build(arch), folder)
    found = 0
    for name, layer in theirs.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            own = ours.get_submodule(name)
            assert gap(own.get_delta_weight("default"), layer.get_delta_weight("default")) < 1e-5  # type: ignore[operator]
            assert (own.scaling, own.r) == (layer.scaling, layer.r)
            found += 1
    assert found > 1


def test_a_layer_without_a_lora_has_its_own_attributes() -> None:
    model: Any = veneer.get_peft_model(build("llama"), veneer.VeraConfig(r=2, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with pytest.raises(AttributeError, match="scaling"):
        _ = layer.scaling
    with pytest.raises(UnknownAdapterError, match="'other'"):
        layer.get_delta_weight("other")


def test_a_layers_tensors_are_a_mapping_of_adapters() -> None:
    model: Any = adapted()
    model.add_adapter("b", config())
    held = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A
    assert list(held) == list(held.keys()) == ["default", "b"]
    assert len(held) == 2
    assert [name for name, leaf in held.items() if leaf is held[name]] == ["default", "b"]
    assert held.values()[1] is held["b"]


@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_loading_leaves_the_model_in_the_mode_that_peft_does(
    trained_base: bool, trainable: bool, tmp_path: Path
) -> None:
    adapter = saved(tmp_path, lora_dropout=0.5)
    modes = []
    for library in (peft, veneer):
        base = build("llama").train(trained_base)
        model: Any = library.PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
        modes.append(_modes(model))
        model.train()
        model.load_adapter(str(adapter), "b")
        modes[-1].append(_modes(model))
    assert modes[0] == modes[1]
    assert modes[0][0] is trainable


@pytest.mark.parametrize("trained_base", [False, True])
def test_a_new_adapter_is_in_training_mode_as_pefts_is(trained_base: bool) -> None:
    modes = []
    for library in (peft, veneer):
        own = library.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
        modes.append(_modes(library.get_peft_model(build("llama").train(trained_base), own)))
    assert modes[0] == modes[1] == [True, True, trained_base, True, trained_base]


def test_veneers_own_loader_sets_the_mode(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    assert not veneer.load(adapter, base=build("llama").train()).training
    assert veneer.load(adapter, base=build("llama"), is_trainable=True).training


def _modes(model: Any) -> list[Any]:
    """Of the model, its tuner, the base, an adapted layer, and one that is not."""
    base = model.get_base_model()
    attention = base.model.layers[0].self_attn
    return [m.training for m in (model, model.base_model, base, attention.q_proj, base.model.norm)]


@pytest.mark.oracle
def test_the_names_of_the_model_and_its_tuner_are_those_of_peft(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path)
    for name in ("prefix", "targeted_module_names", "targeted_parameter_names", "active_adapters"):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert getattr(ours.base_model, name) == getattr(theirs.base_model, name), name
    assert type(ours.model) is type(theirs.model)
    assert ours.model is ours.get_base_model()
    prompt = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    prompted = [lib.get_peft_model(build("llama"), lib.PromptTuningConfig(**prompt)) for lib in (peft, veneer)]
    assert type(prompted[0].model) is type(prompted[1].model)


def test_tuner_answers_about_conversion_and_active_adapters() -> None:
    model = veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), veneer.LoraConfig(target_modules=["0"]))
    model.add_adapter("other", veneer.LoraConfig(target_modules=["0"]))
    assert model.base_model.active_adapter == "default"
    model.base_model.set_adapter(["default", "other"])
    assert model.base_model.active_adapter == ["default", "other"]
    assert model.supports_lora_conversion()
    assert not model.supports_lora_conversion("absent")
    assert model.base_model.get_model_config(torch.nn.Linear(1, 1)) == {"model_type": "custom"}


def test_layers_name_their_tensors_and_adapters_and_a_load_its_keys(tmp_path: Path) -> None:
    options = {"target_modules": ["0"], "target_parameters": ["1.weight"]}
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**options))
    layer = model.base_model.model[0]
    assert layer.adapter_layer_names == ("lora_A", "lora_B")
    assert layer._all_available_adapter_names() == ["default"]
    assert model.base_model.model[1].parameter_name == "weight"
    model.save_pretrained(tmp_path)
    report = veneer.PeftModel.from_pretrained(base, tmp_path).load_adapter(tmp_path, "other")
    assert report.missing_keys == report.unexpected_keys == []


@pytest.mark.parametrize("topk_only", [False, True])
def test_what_is_saved_is_counted_as_in_peft(topk_only: bool) -> None:
    options: dict[str, Any] = {"num_vectors": 10, "vector_length": 2, "save_only_topk_weights": topk_only}
    counts = []
    for library in (peft, veneer):
        base = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        model: Any = library.get_peft_model(base, library.VBLoRAConfig(target_modules=["0"], **options))
        base[1].requires_grad_(True)
        counts.append(model.get_nb_savable_parameters())
    assert counts[0] == counts[1]
    assert counts[1][1] == 14
