"""Arrow: tokens that are routed over LoRA adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from tests.models import build, gap, inputs, logits
from veneer.errors import AdapterError, ConfigError, ConfigTypeError, MergeError, UnsupportedError

TARGETS = ["q_proj", "down_proj"]


def saved_loras(folder: Path, arch: str = "llama", count: int = 5, **more: Any) -> list[Path]:
    """LoRA adapters whose changes have one direction that prevails, so that a few steps of iteration find it."""
    found = []
    for index in range(count):
        targets = more.get("target_modules", TARGETS)
        options = {"r": 4, "lora_alpha": 8 + index, "init_lora_weights": False, **more, "target_modules": targets}
        model = veneer.get_peft_model(build(arch), veneer.LoraConfig(**options), seed=index)
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.data = 0.1 * torch.randn(
                    parameter.shape,
                    generator=torch.Generator().manual_seed(len(name) * 7 + sum(map(ord, name)) + index),
                )
                parameter.data.select(0 if "lora_A" in name else 1, 0).mul_(8)
        model.save_pretrained(folder / f"lora_{index}")
        found.append(folder / f"lora_{index}")
    return found


def ours(paths: list[Path], arch: str = "llama", **options: Any) -> veneer.PeftModel:
    return veneer.create_arrow_model(build(arch), paths[:3], veneer.ArrowConfig(**options), paths[3:])


def peers(paths: list[Path], arch: str = "llama", **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [str(path) for path in paths]
        config = peft.ArrowConfig(rng_seed=1, **options)
        model: nn.Module = peft.create_arrow_model(build(arch), names[:3], config, names[3:]).eval()
        return model


OPTIONS = [{"top_k": 2}, {"top_k": 1}, {"top_k": 3, "router_temperature": 0.3}, {"top_k": 2, "use_gks": True}]


@pytest.mark.oracle
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_output_is_as_in_peft(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    more = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if arch == "gpt2" else {}
    paths = saved_loras(tmp_path, arch, **more)
    batch = inputs(arch)
    found, wanted = logits(ours(paths, arch, **options), batch), logits(peers(paths, arch, **options), batch)
    assert gap(wanted, logits(build(arch), batch)) > 0.02
    assert gap(found, wanted) < 1e-5


@pytest.mark.oracle
def test_what_peft_saves_loads_and_the_adapters_keep_their_bytes(tmp_path: Path) -> None:
    paths = saved_loras(tmp_path)
    theirs = peers(paths, top_k=2)
    wanted = logits(theirs, inputs("llama"))
    theirs.save_pretrained(tmp_path / "theirs")
    # A set is listed by names, so the router comes before what it routes over.
    model = veneer.load(tmp_path / "theirs", base=build("llama"))
    model.set_adapter("arrow_router")
    assert gap(logits(model, inputs("llama")), wanted) < 1e-5

    model = ours(paths, top_k=2, use_gks=True)
    expected = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path / "ours")
    again = veneer.load(tmp_path / "ours", base=build("llama"))
    assert again.active_adapters == ["arrow_router"]
    assert torch.equal(logits(again, inputs("llama")), expected)
    for index, path in enumerate(paths[:3]):
        own, kept = (load_file(f / "adapter_model.safetensors") for f in (path, tmp_path / "ours" / f"task_{index}"))
        assert all(torch.equal(own[key], kept[key]) for key in own)


def test_it_is_used_beside_others_and_in_rows(tmp_path: Path) -> None:
    model = ours(saved_loras(tmp_path), top_k=2)
    batch = inputs("llama")
    routed, base = logits(model, batch), logits(build("llama").requires_grad_(False), batch)
    with model.using("task_1"):
        alone = logits(model, batch)
    mixed = logits(model, batch, adapter_names=["arrow_router", "task_1"])
    assert gap(mixed[0], routed[0]) < 1e-5
    assert gap(mixed[1], alone[1]) < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.set_adapter(["arrow_router", "task_1"])
    assert gap(logits(model, batch), routed) > 0.01
    tokens: Any = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    slow = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(tokens, slow)


def test_changed_weights_are_routed_anew(tmp_path: Path) -> None:
    paths = saved_loras(tmp_path)
    model = ours([*paths[:2], paths[0]], top_k=1)
    before = logits(model, inputs("llama"))
    veneer.hotswap_adapter(model, paths[3], adapter_name="task_0")
    expected = logits(ours([paths[3], paths[1], paths[0]], top_k=1), inputs("llama"))
    assert gap(logits(model, inputs("llama")), expected) < 1e-5
    assert gap(before, expected) > 0.01


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 2, "use_gks": True}], ids=str)
@pytest.mark.oracle
def test_one_that_is_loaded_later_joins_as_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    paths = saved_loras(tmp_path)
    expected = logits(ours(paths, **options), inputs("llama"))
    model = veneer.create_arrow_model(build("llama"), paths[:2], veneer.ArrowConfig(**options), paths[3:])
    theirs: Any = peft.create_arrow_model(build("llama"), paths[:2], peft.ArrowConfig(**options), paths[3:]).eval()
    before = logits(model, inputs("llama"))
    for each in (model, theirs):
        each.load_adapter(str(paths[2]), adapter_name="later")
        assert gap(logits(each, inputs("llama")), expected) < 1e-4
    assert gap(before, expected) > 0.01
    model.load_adapter(paths[3], adapter_name="later")  # in its place
    assert model.peft_config["arrow_router"].experts[:3] == ("task_0", "task_1", "later")
    model.save_pretrained(tmp_path / "saved")
    again = veneer.load(tmp_path / "saved", base=build("llama"))
    assert torch.equal(logits(again, inputs("llama")), logits(model, inputs("llama")))


def test_one_that_cannot_be_mixed_stays_out_with_a_warning(tmp_path: Path) -> None:
    paths = saved_loras(tmp_path)
    model = ours(paths, top_k=2, use_gks=True)
    expected = logits(model, inputs("llama"))
    others = {"dora": {"use_dora": True}, "wide": {"r": 5}}
    for name, more in others.items():
        with pytest.warns(veneer.VeneerWarning, match=f"'{name}' takes no part in 'arrow_router'"):
            model.load_adapter(saved_loras(tmp_path / name, count=1, **more)[0], adapter_name=name)
    model.load_adapter(saved_loras(tmp_path / "away", count=1, target_modules=["o_proj"])[0], adapter_name="away")
    assert torch.equal(logits(model, inputs("llama")), expected)


def test_what_cannot_be_is_refused_with_a_mend(tmp_path: Path) -> None:
    paths = saved_loras(tmp_path)
    model = ours(paths, top_k=2)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="no weight"):
            merge()
    for change in (lambda: model.delete_adapter("task_1"), lambda: model.rename_adapter("task_1", "b")):
        with pytest.raises(AdapterError, match="mixes 'task_1'"):
            change()
    model.delete_adapter("arrow_router")
    model.delete_adapter("task_1")
    config = veneer.LoraConfig(arrow_config={"task_adapter_names": ["task_0", "task_1"]})
    with pytest.raises(AdapterError, match="is not on this model"):
        model.add_adapter("router", config)
    with pytest.raises(AdapterError, match="task_specific_adapter_paths is empty"):
        veneer.create_arrow_model(build("llama"), [], veneer.ArrowConfig())
    base = build("llama")
    embedded = saved_loras(tmp_path / "embedded", count=1, target_modules=["embed_tokens"])
    with pytest.raises(ConfigTypeError, match=r"'task_0' is on .*embed_tokens.* only target Linear"):
        veneer.create_arrow_model(base, embedded, veneer.ArrowConfig())
    assert torch.equal(logits(base, inputs("llama")), logits(build("llama"), inputs("llama")))
    with pytest.raises(AdapterError, match="general_adapter_paths is empty"):
        veneer.create_arrow_model(build("llama"), paths, veneer.ArrowConfig(use_gks=True))
    with pytest.raises(ConfigError, match="top_k"):
        veneer.ArrowConfig(top_k=0)
    with pytest.raises(UnsupportedError, match="product of two matrices"):
        veneer.create_arrow_model(build("llama"), saved_loras(tmp_path / "d", use_dora=True), veneer.ArrowConfig())
    wide = saved_loras(tmp_path / "wide", r=5)
    with pytest.raises(UnsupportedError, match="different ranks"):
        ours([*paths[:3], *wide[3:]], use_gks=True)
