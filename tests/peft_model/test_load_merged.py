"""``load(path, merge=True)``: the model that merging afterwards gives, and no layer is wrapped on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import bits, config, edit_tensors, enlarge, same_bits, saved_base
from veneer.errors import MergeError
from veneer.layers.adapted_layer import AdaptedLayer
from veneer.layers.merge_only import MergeOnlyLayer

VISIBLE = 1e-2
MERGEABLE: Mapping[str, tuple[str, veneer.PeftConfig]] = {
    "LoRA and a whole head": ("llama", config(modules_to_save=["lm_head"])),
    "DoRA": ("llama", config(use_dora=True)),
    "new biases": ("llama", config(lora_bias=True)),
    "all biases and a classifier": ("bert", config("bert", bias="all")),
    "BEFT": ("bert", veneer.BeftConfig(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "tokens of a tied embedding": ("gpt2", config("gpt2", trainable_token_indices=[5, 9])),
    "a convolution": ("vit", config("vit", target_modules=["q_proj", "projection"])),
    "a parameter": ("llama", config(target_modules=["q_proj"], target_parameters=["layers.1.mlp.down_proj.weight"])),
    "shared tensors": ("llama", veneer.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "repeated blocks": ("llama", config(layer_replication=[[0, 2], [0, 1]])),
}
REFUSED: Mapping[str, veneer.PeftConfig] = {
    "a prompt": veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "what depends on the position": config(alora_invocation_tokens=[5, 6]),
}


def make(folder: Path, arch: str, chosen: veneer.PeftConfig) -> Path:
    """A folder with an adapter of the architecture's base."""
    model = veneer.get_peft_model(build(arch), chosen, seed=1).eval()
    enlarge(model, "default")
    model.save_pretrained(folder)
    return folder


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@contextmanager
def wrapping_refused() -> Iterator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a layer is wrapped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptedLayer, "__init__", refuse)
        yield


def check_alike(adapter: Path, base: Path) -> veneer.PeftModel:
    """The model loaded merged, which is the one that is merged after it was loaded."""
    later = veneer.load(adapter, base=base)
    merged = later.merge_and_unload()
    with wrapping_refused():
        model = veneer.load(adapter, base=base, merge=True)
    direct = model.get_base_model()
    assert same_bits(bits(direct), bits(merged))
    assert (kinds(direct), trained(direct)) == (kinds(merged), trained(merged))
    assert direct.config.to_dict() == merged.config.to_dict()
    assert model.load_report is not None
    assert later.load_report is not None
    assert replace(model.load_report, seconds={}) == replace(later.load_report, seconds={}, merged=True)
    return model


@pytest.mark.parametrize("name", MERGEABLE)
def test_it_is_what_merging_afterwards_gives(name: str, tmp_path: Path) -> None:
    arch, chosen = MERGEABLE[name]
    base = saved_base(tmp_path / "base", arch)
    model = check_alike(make(tmp_path / "adapter", arch, chosen), base)
    assert gap(logits(model, inputs(arch)), logits(build(arch), inputs(arch))) > VISIBLE


def test_several_on_one_layer_are_merged_in_their_order(tmp_path: Path) -> None:
    model = veneer.load(saved_base(tmp_path / "base"))
    for seed, (name, options) in enumerate({"a": {}, "b": {"use_dora": True}, "idle": {}}.items()):
        model.add_adapter(name, config(**options), seed=seed)
        enlarge(model, name, seed)
    model.set_adapter(["b", "a"])
    model.save_pretrained(tmp_path / "set")
    found = check_alike(tmp_path / "set", tmp_path / "base")
    assert gap(logits(found, inputs("llama")), logits(model, inputs("llama"))) < 1e-5


@contextmanager
def places() -> Iterator[list[tuple[int, int]]]:
    """Where the weight of each layer lies before and after it is merged."""
    found = []
    merge = MergeOnlyLayer.store_merged

    def watch(layer: MergeOnlyLayer, names: tuple[str, ...]) -> None:
        before = layer.site.stored.data_ptr()
        merge(layer, names)
        found.append((before, layer.site.stored.data_ptr()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeOnlyLayer, "store_merged", watch)
        yield found


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_converted_base_is_taken_and_a_mapped_one_stays(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    adapter, base = make(tmp_path / "adapter", "llama", config()), tmp_path / "base"
    build("llama").to(stored).save_pretrained(base)
    files = {path: path.read_bytes() for path in base.iterdir()}
    plain = veneer.load(base, dtype=dtype).get_base_model()
    before = bits(plain)
    with places() as found:
        merged = veneer.load(adapter, base=base, dtype=dtype, merge=True).get_base_model()
    assert found
    assert all((one == other) == (stored != dtype) for one, other in found)
    assert not same_bits(bits(merged), before)
    assert same_bits(bits(plain), before), "another model of the same files"
    assert {path: path.read_bytes() for path in base.iterdir()} == files


def test_the_memory_of_a_base_that_was_given_or_is_shared_is_not_taken(tmp_path: Path) -> None:
    given = build("llama")
    kept = dict(given.named_parameters())
    before = bits(given)
    with places() as found:
        veneer.load(make(tmp_path / "a", "llama", config()), base=given, merge=True)
    assert found
    assert all(one != other for one, other in found)
    assert all(torch.equal(before[name], parameter) for name, parameter in kept.items())

    tied = make(tmp_path / "b", "gpt2", config("gpt2", target_modules=["lm_head", "c_fc"]))
    # The float32 rows that were saved beside it are not those of a base in bfloat16.
    edit_tensors(tied, lambda tensors: {key: t for key, t in tensors.items() if "base_layer" not in key})
    build("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    with places() as found:
        merged = veneer.load(tied, base=tmp_path / "base", dtype="float32", merge=True).get_base_model()
    assert [one == other for one, other in found].count(False) == 1
    assert torch.equal(merged.transformer.wte.weight, build("gpt2").transformer.wte.weight.to(torch.bfloat16).float())


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_merged_form_is_refused_in_the_same_words(name: str, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter", "llama", REFUSED[name])
    base = build("llama")
    before = kinds(base)
    with pytest.raises(MergeError) as direct, wrapping_refused():
        veneer.load(adapter, base=base, merge=True)
    assert kinds(base) == before
    later = veneer.load(adapter, base=build("llama"))
    with pytest.raises(MergeError) as afterwards:
        later.merge_and_unload()
    found, expected = direct.value, afterwards.value
    assert (found.message, found.hint) == (expected.message, expected.hint)


def test_what_is_loaded_after_that_is_wrapped_again(tmp_path: Path) -> None:
    adapter, base = make(tmp_path / "adapter", "llama", config()), saved_base(tmp_path / "base")
    model = veneer.load(adapter, base=base, merge=True)
    once = logits(model, inputs("llama"))
    model.load_adapter(adapter, "again")
    assert any(isinstance(module, AdaptedLayer) for module in model.modules())
    assert gap(logits(model, inputs("llama")), once) > VISIBLE
    with model.disable_adapter():
        assert gap(logits(model, inputs("llama")), once) == 0
