"""Names survive every way round: checkpoint keys and slots, names in memory and on disk, configs and their JSON."""

from __future__ import annotations

import dataclasses
import json
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import veneer
from tests.models import gap
from veneer.configs.base import PeftConfig, PromptConfig, config_class, registered
from veneer.errors import ConfigError, DuplicateAdapterError
from veneer.files.tensor_keys import Slot, decode, encode
from veneer.methods import method_of
from veneer.methods.base.method import MethodOnSites, leaves_of

# What a config needs beside its defaults, where its method has no case of its own.
NEEDED: dict[str, dict[str, Any]] = {"CPT": {"task_type": "CAUSAL_LM"}, "XLORA": {"adapters": {"0": "path"}}}
LAYER_METHODS = [name for name in registered() if not issubclass(config_class(name, "test"), PromptConfig)]


def config_of(peft_type: str, **options: Any) -> PeftConfig:
    kind = config_class(peft_type, "test")
    needed = NEEDED.get(peft_type, {})
    if issubclass(kind, PromptConfig):
        return kind(**{"num_virtual_tokens": 4, **needed, **options})
    own = f"tests.methods.case_{peft_type.lower()}"
    case = import_module(own).CASES[0].options if find_spec(own) else needed
    return kind(**{**case, **options})


def leaves(peft_type: str) -> list[str]:
    """A method's leaves, in the order in which the plan tries them."""
    return list(leaves_of([MethodOnSites(method_of(config_of(peft_type)), [])]))


ALL_LEAVES = sorted({leaf for name in LAYER_METHODS for leaf in leaves(name)})
# Names that look like parts of keys, and any other text that a module can be called.
parts = st.sampled_from([*(p for leaf in ALL_LEAVES for p in leaf.split(".")), "base_model", "default", "0"]) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="."), min_size=1, max_size=8
)
modules = st.lists(parts, min_size=1, max_size=5).map(".".join)


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("peft_type", LAYER_METHODS)
@given(module=modules)
def test_every_leaf_of_every_method_comes_back(peft_type: str, module: str) -> None:
    own = leaves(peft_type)
    for leaf in own:
        found = decode(encode(module, leaf), own)
        # "x.lora_B" with the leaf "weight" is the key of "x" with the leaf "lora_B.weight": the longest leaf counts.
        longer = [other for other in own if f"{module}.{leaf}".endswith(f".{other}")]
        assert found == Slot(f"{module}.{leaf}"[: -len(longer[0]) - 1], longer[0])
        assert found is not None
        assert encode(found.module, found.leaf) == encode(module, leaf)
        assert found == Slot(module, leaf) or len(longer[0]) > len(leaf)


# Everything but what a name cannot hold; "keys", "forward" and their like are attributes of torch's containers.
names = st.sampled_from(["default", "lora_A", "weight", "keys", "forward", "base_layer", "0"]) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="./\\"), min_size=1, max_size=12
)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = nn.ModuleDict({"lora_A": nn.Linear(3, 4), "weight": nn.Linear(4, 3)})
        return nn.Sequential(inner["lora_A"], nn.Tanh(), nn.ModuleDict({"q": inner["weight"]})["q"]).eval()


LORA = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, "lora_bias": True, "use_dora": True}


@settings(max_examples=40, deadline=None)
@given(name=names, other=names)
def test_any_name_of_an_adapter_stands_in_memory_and_never_on_disk(
    tmp_path_factory: pytest.TempPathFactory, name: str, other: str
) -> None:
    folder = tmp_path_factory.mktemp("named")
    model = veneer.get_peft_model(net(), veneer.LoraConfig(**LORA), adapter_name=name, seed=1).eval()
    held = set(model.state_dict())
    for leaf in ("lora_A.{}.weight", "lora_B.{}.bias", "lora_magnitude_vector.{}.weight"):
        assert f"base_model.model.2.{leaf.format(name)}" in held
    model.save_pretrained(folder)
    [saved] = folder.rglob("adapter_model.safetensors")
    tensors = load_file(saved)
    assert {key.removeprefix("base_model.model.0.") for key in tensors if ".0." in key} == {
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_magnitude_vector",
    }
    again = veneer.PeftModel.from_pretrained(net(), saved.parent, adapter_name=other).eval()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert gap(again(x), model(x)) < 1e-6
    names_there = set(again.state_dict())
    assert f"base_model.model.2.lora_A.{other}.weight" in names_there
    assert len(names_there) == len(held)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\\b", "__base__", 3])
def test_what_cannot_be_a_name_is_refused(name: Any) -> None:
    with pytest.raises(DuplicateAdapterError, match="cannot be an adapter's name"):
        veneer.get_peft_model(net(), veneer.LoraConfig(**LORA), adapter_name=name)


targets = st.sampled_from(["all-linear", r".*\.q"]) | st.lists(st.text(max_size=5), min_size=1, max_size=3)
unknown = st.dictionaries(
    st.text("abcxyz", min_size=3, max_size=6).map("zz_{}".format),
    st.none() | st.integers() | st.lists(st.integers(), max_size=3) | st.text(max_size=5).filter(lambda s: s != ""),
    max_size=2,
)
patterns = st.dictionaries(st.sampled_from(["q", "layers.1.q", "é", ".*q", "b", "a"]), st.integers(1, 64), max_size=4)
# AdaLoRA's ranks are masks; X-LoRA's layers are its experts'; SuperTuning scales a LoRA where it has a rank.
NOT_SAVED = {"ADALORA": {"rank_pattern"}, "XLORA": {"target_modules"}, "SUPERTUNING": {"lora_alpha"}}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "target_modules": targets,
    "modules_to_save": st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=2),
    "base_model_name_or_path": st.none() | st.text(max_size=9),
    "revision": st.none() | st.just("main"),
    "lora_alpha": st.integers(1, 10**6) | st.floats(0.001, 1e6),
    "rank_pattern": patterns,
    "alpha_pattern": patterns,
}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@pytest.mark.parametrize("peft_type", registered())
@given(data=st.data(), extra=unknown)
def test_a_config_is_the_same_after_its_json(peft_type: str, data: st.DataObject, extra: dict[str, Any]) -> None:
    own = {f.name for f in dataclasses.fields(config_class(peft_type, "test"))}
    own -= NOT_SAVED.get(peft_type, set())
    drawn = {name: data.draw(values, name) for name, values in FIELDS.items() if name in own}
    try:
        config = config_of(peft_type, **drawn)
    except ConfigError:  # what this method has another idea of
        reject()
    config.extra = extra
    text = config.to_json()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown keys are told of
        again = PeftConfig.from_dict(json.loads(text))
    assert type(again) is type(config)
    assert again.to_json() == text
    assert dataclasses.replace(again, inference_mode=False) == config
    for name in ("rank_pattern", "alpha_pattern"):
        # Of several patterns that fit the first counts.
        assert list(getattr(again, name, None) or ()) == list(getattr(config, name, None) or ())
