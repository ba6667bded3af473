"""Bases of which a part lies on disk between calls, and what decides where a base goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from tests.models import build, gap, inputs, logits
from tests.random_adapters import WEIGHTS, adapted, config, edit_tensors, enlarge, saved, saved_base
from veneer.base_model.sites import offload

BATCH = inputs("llama")
DISK = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "gpt2": {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.drop": "cpu",
        "transformer.h.0": "disk",
        "transformer.h.1": "disk",
        "transformer.ln_f": "disk",
        "lm_head": "cpu",
    },
}


class World:
    """A base, an adapter, and a way to load them with and without offloading."""

    def __init__(self, root: Path, arch: str, **options: Any) -> None:
        self.root, self.arch = root, arch
        self.base = saved_base(root / "base", arch)
        self.folder = saved(root / "adapter", arch, **options)
        self.batch = inputs(arch)

    def load(self, **options: Any) -> veneer.PeftModel:
        return veneer.load(self.folder, base=self.base, **options)

    def offloaded(self, **options: Any) -> veneer.PeftModel:
        model = self.load(device_map=DISK[self.arch], offload_folder=str(self.root / "offload"), **options)
        assert any(parameter.is_meta for parameter in model.parameters())
        return model

    def logits(self, model: nn.Module, **choice: Any) -> Tensor:
        return logits(model, self.batch, **choice)


@pytest.fixture(params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, request.param)


def test_applied_chosen_and_saved(world: World, tmp_path: Path) -> None:
    expected = world.logits(world.load())
    model = world.offloaded()
    assert torch.equal(world.logits(model), expected)
    with model.disable_adapter():
        base = world.logits(model)
    assert gap(base, expected) > 0.02
    mixed = world.logits(model, adapter_names=["default", "__base__"])
    assert gap(mixed[0], expected[0]) < 1e-5
    assert gap(mixed[1], base[1]) < 1e-5
    model.save_pretrained(tmp_path / "again")
    was, now = load_file(world.folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[key], now[key]) for key in was)


def test_merged_and_unmerged(world: World) -> None:
    plain = world.load()
    unmerged = world.logits(plain)
    plain.merge_adapter()
    expected = world.logits(plain)
    model = world.offloaded()
    model.merge_adapter(safe_merge=True)
    assert torch.equal(world.logits(model), expected)
    with model.disable_adapter():
        base = world.logits(model)
    with plain.disable_adapter():
        assert torch.equal(base, world.logits(plain))
    model.unmerge_adapter()
    assert torch.equal(world.logits(model), unmerged)
    # What was merged has left memory and disk; the offloaded files are as they were.
    assert not list(world.root.rglob("merged-*"))
    model.delete_adapter("default")
    assert torch.equal(world.logits(model), base)


def test_merged_for_good_and_saved(world: World, tmp_path: Path) -> None:
    expected = world.logits(world.load(merge=True))
    merged = world.offloaded(merge=True).get_base_model()
    assert any(parameter.is_meta for parameter in merged.parameters())
    assert torch.equal(world.logits(merged), expected)
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        merged.save_pretrained(tmp_path / "merged")
    again = type(build(world.arch)).from_pretrained(tmp_path / "merged")
    assert torch.equal(world.logits(again.eval()), expected)


def test_offloaded_layers_are_trained_beside(world: World) -> None:
    model = world.offloaded(is_trainable=True)
    model.train()
    model(**world.batch, labels=world.batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.adapters.parameters("default"))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"target_parameters": ["layers.1.mlp.down_proj.weight"], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [5, 9]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_the_weights_finds_them(options: dict[str, Any], tmp_path: Path) -> None:
    world = World(tmp_path, "llama", **options)
    expected, merged = world.logits(world.load()), world.logits(world.load(merge=True))
    model = world.offloaded()
    assert torch.equal(world.logits(model), expected)
    assert gap(world.logits(model.merge_and_unload()), merged) < 1e-6


def test_new_adapters_start_from_offloaded_weights(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    found = []
    for model in (world.load(), world.offloaded()):
        model.add_adapter("new", config(use_dora=True, modules_to_save=["lm_head"]), seed=3)
        found.append(model.get_adapter_state_dict("new"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_offloaded_to_cpu_memory() -> None:
    from accelerate import cpu_offload

    expected = logits(adapted(), BATCH)
    plain = adapted()
    plain.merge_adapter()
    model = veneer.get_peft_model(cpu_offload(build("llama"), execution_device="cpu"), config(), seed=1).eval()
    enlarge(model, "default")
    assert torch.equal(logits(model, BATCH), expected)
    model.merge_adapter()
    assert torch.equal(logits(model, BATCH), logits(plain, BATCH))
    model.unmerge_adapter()
    assert torch.equal(logits(model, BATCH), expected)


def test_an_overlay_is_a_mapping() -> None:
    laid = offload.Overlay({"a": torch.zeros(1), "b": torch.zeros(1)})
    laid.replaced["b"] = torch.ones(1)
    laid.replaced["c"] = torch.ones(1)
    assert {name: float(value) for name, value in laid.items()} == {"a": 0, "b": 1, "c": 1}
    assert len(laid) == 3


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}], ids=str
)
def test_device_maps(options: dict[str, Any], tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    model = world.load(**options)
    assert torch.equal(world.logits(model), world.logits(world.load()))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_max_memory_sends_the_rest_to_disk(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    room = {"cpu": "60KB"}
    model = world.load(device_map="auto", max_memory=room, offload_folder=str(tmp_path / "offload"))
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(world.logits(model), world.logits(world.load()))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("own", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", ["auto", *DTYPES], ids=str)
def test_dtypes_are_as_asked(wanted: Any, own: torch.dtype, tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    edit_tensors(world.folder, lambda tensors: {key: tensor.to(own) for key, tensor in tensors.items()})
    stored = (world.base / "model.safetensors").read_bytes()
    base = torch.float32 if wanted == "auto" else wanted
    model = world.load(dtype=wanted)
    names = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in names.items() if "lora_" in name} == {own}
    assert {dtype for name, dtype in names.items() if "lora_" not in name} == {base}
    report = model.load_report
    assert report is not None
    assert report.dtype == str(base).removeprefix("torch.")
    assert report.adapters[0].dtypes == [str(own).removeprefix("torch.")]
    answer = world.logits(model)
    assert answer.dtype == base
    assert gap(answer, world.logits(world.load(dtype=torch.float32))) < (1e-5 if base == torch.float32 else 0.1)
    model.save_pretrained(tmp_path / "again")
    assert {t.dtype for t in load_file(tmp_path / "again" / WEIGHTS).values()} == {own}
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {base}
    assert (world.base / "model.safetensors").read_bytes() == stored


def test_training_dtypes_are_as_asked(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    edit_tensors(world.folder, lambda tensors: {key: tensor.half() for key, tensor in tensors.items()})

    def dtypes(**options: Any) -> set[torch.dtype]:
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.bfloat16)
        model = veneer.PeftModel.from_pretrained(base, world.folder, is_trainable=True, **options)
        assert model.dtype == torch.bfloat16
        return {p.dtype for p in model.adapters.parameters("default")}

    assert dtypes() == {torch.float32}
    assert dtypes(autocast_adapter_dtype=False) == {torch.float16}
    config_dtype = json.loads((world.base / "config.json").read_text())["dtype"]
    assert config_dtype == "float32"
