"""diffusers' files, and the one that ComfyUI reads: read independently of Veneer, they say what PEFT's folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats import diffusion_bases as bases
from tests.formats.same_changes import assert_same
from tests.formats.test_kohya import MIXED, OPTIONS, of_peft, product
from veneer.errors import BindError, CorruptFileError, UnsupportedError, UsageError


def metadata_of(file: Path) -> dict[str, Any] | None:
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    return None if text is None else json.loads(text)


def of_diffusers(file: Path, component: str) -> dict[str, Tensor]:
    """The change of each weight as diffusers computes it: by the config in the metadata, or with alpha = r."""
    tensors, config = load_file(file), metadata_of(file)
    result = {}
    for key, down in tensors.items():
        if not key.startswith(f"{component}.") or not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(f"{component}.").removesuffix(".lora_A.weight")
        rank = down.shape[0]
        scale = 1.0
        if config is not None:
            options = {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
            values = {"rank_pattern": options["r"], "alpha_pattern": options["lora_alpha"]}
            for option in values:
                patterns = options.get(option, {}).items()
                values[option] = next((v for k, v in patterns if name.endswith(k.replace("\\", ""))), values[option])
            assert values["rank_pattern"] == rank
            scale = values["alpha_pattern"] / (rank**0.5 if options.get("use_rslora") else rank)
        result[name] = scale * product(tensors[key.replace("lora_A", "lora_B")], down)
    return result


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("model", "component"), [("unet", "unet"), ("flux", "transformer")])
def test_a_file_with_its_config(tmp_path: Path, model: str, component: str, options: dict[str, Any]) -> None:
    shapes = getattr(bases, model)()
    base = bases.stored(tmp_path / "base", shapes)
    veneer.convert(bases.lora(tmp_path / "written", shapes, **options), tmp_path / "adapter")
    report = veneer.convert(tmp_path / "adapter", tmp_path / "out", to="diffusers", base=base)
    assert {step.kind for step in report.steps} == {"exact"}
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert_same(of_diffusers(file, component), of_peft(tmp_path / "adapter"))
    config = metadata_of(file)
    assert config is not None
    known = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"}
    assert {key.removeprefix(f"{component}.") for key in config} <= known
    veneer.convert(file, tmp_path / "again")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert_same(of_peft(tmp_path / "again"), of_peft(tmp_path / "adapter"))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_file_without_scale_for_comfyui(tmp_path: Path, options: dict[str, Any]) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    adapter = bases.lora(tmp_path / "adapter", bases.flux(), **options)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="comfyui", base=base)
    assert metadata_of(tmp_path / "out.safetensors") is None
    assert_same(of_diffusers(tmp_path / "out.safetensors", "transformer"), of_peft(adapter))
    ranks = {t.shape[0] for key, t in load_file(tmp_path / "out.safetensors").items() if "lora_A" in key}
    assert ranks == {4}
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    assert_same(of_peft(tmp_path / "again"), of_peft(adapter))


def test_the_facts_of_the_example(tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    down, up = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 3]]), torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0]])
    tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name]}
    adapter = bases.adapter(tmp_path / "adapter", config, tensors)
    veneer.convert(adapter, tmp_path / "d.safetensors", to="diffusers", component="transformer")
    file = load_file(tmp_path / "d.safetensors")
    assert torch.equal(file[f"transformer.{name}.lora_B.weight"], up)
    config = metadata_of(tmp_path / "d.safetensors") or {}
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (2, 4)
    veneer.convert(adapter, tmp_path / "c.safetensors", to="comfyui", component="transformer")
    assert load_file(tmp_path / "c.safetensors")[f"transformer.{name}.lora_B.weight"].tolist() == [
        *([2, 0], [0, 2], [2, 2], [4, 0])
    ]


def test_all_components_of_a_pipeline(tmp_path: Path) -> None:
    layer = "encoder.layers.0.self_attn.q_proj"
    bases.lora(tmp_path / "all" / "unet", {"mid_block.attentions.0.proj_in": (8, 8, 1, 1)})
    bases.lora(tmp_path / "all" / "text_encoder", {layer: (8, 8)}, r=2, use_rslora=True)
    veneer.convert(tmp_path / "all", tmp_path / "out.safetensors", to="diffusers")
    tensors = load_file(tmp_path / "out.safetensors")
    # As every version of transformers before 5.6 names it, and every file does.
    assert f"text_encoder.text_model.{layer}.lora_A.weight" in tensors
    config = metadata_of(tmp_path / "out.safetensors") or {}
    assert (config["unet.r"], config["text_encoder.r"], config["text_encoder.use_rslora"]) == (4, 2, True)
    pipeline = bases.pipeline(tmp_path / "base", unet="UNet", text_encoder="CLIP")
    bases.stored(pipeline / "unet", bases.unet())
    bases.clip(pipeline / "text_encoder")
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=pipeline)
    for component in ("unet", "text_encoder"):
        assert_same(of_peft(tmp_path / "again" / component), of_peft(tmp_path / "all" / component))
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "one", component="text_encoder")
    assert list(of_peft(tmp_path / "one")) == [f"text_model.{layer}"]


def test_dora(tmp_path: Path) -> None:
    shapes: bases.Shapes = {"conv_in": (4, 3, 3, 3), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8)}
    base = bases.stored(tmp_path / "base", bases.unet())
    adapter = bases.lora(tmp_path / "adapter", shapes, use_dora=True)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="diffusers", base=base)
    tensors = load_file(tmp_path / "out.safetensors")
    own = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in own.items():
        assert torch.equal(tensors[f"unet.{key.removeprefix('base_model.model.')}"], tensor)
    assert (metadata_of(tmp_path / "out.safetensors") or {})["unet.use_dora"] is True


@pytest.mark.parametrize("with_config", [True, False])
def test_a_bias_of_the_factors(tmp_path: Path, with_config: bool) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj_out"], "lora_bias": True}
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (4, 2), "lora_B.bias": (4,)}
    tensors = {f"base_model.model.proj_out.{leaf}": torch.randn(shape) for leaf, shape in shapes.items()}
    adapter = bases.adapter(tmp_path / "adapter", config, tensors)
    veneer.convert(adapter, tmp_path / "a.safetensors", to="diffusers", component="transformer")
    assert (metadata_of(tmp_path / "a.safetensors") or {})["transformer.lora_bias"] is True
    if not with_config:
        save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_bias"] is True


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_file_of_before_peft(tmp_path: Path, alpha: float | None) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    places = {"to_q": "processor.to_q_lora", "to_out.0": "processor.to_out_lora"}
    tensors: dict[str, Tensor] = {}
    expected = {}
    for layer, name in places.items():
        down, up = torch.randn(3, 8), torch.randn(8, 3)
        tensors |= {f"unet.{attention}.{name}.down.weight": down, f"unet.{attention}.{name}.up.weight": up}
        expected[f"{attention}.{layer}"] = product(up, down)
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors |= {f"{text}.to_k_lora.down.weight": down, f"{text}.to_k_lora.up.weight": up}
    layer = f"{text}.out_proj.lora_linear_layer"
    tensors |= {f"{layer}.down.weight": down.clone(), f"{layer}.up.weight": up.clone()}
    if alpha is not None:
        tensors[f"unet.{attention}.to_q.alpha"] = torch.tensor(alpha)
        expected[f"{attention}.to_q"] *= alpha / 3
    save_file(tensors, tmp_path / "a.safetensors")
    report = veneer.convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert "no metadata" in report.notes[0]
    assert_same(of_peft(tmp_path / "out" / "unet"), expected)
    names = [f"text_model.encoder.layers.0.self_attn.{name}" for name in ("k_proj", "out_proj")]
    assert sorted(of_peft(tmp_path / "out" / "text_encoder")) == names


def test_a_file_of_one_model(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    name = "transformer_blocks.1.attn.to_add_out"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(8, 2)}
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["to_add_out"]}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "out")
    expected = {name: 1.5 * product(tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"])}
    assert_same(of_peft(tmp_path / "out"), expected)
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "again.safetensors", to="diffusers", base=base)
    assert_same(of_diffusers(tmp_path / "again.safetensors", "transformer"), expected)
    with pytest.raises(UsageError, match="--component unet"):
        veneer.convert(tmp_path / "out", tmp_path / "never.safetensors", to="diffusers")


NAME = "transformer.transformer_blocks.0.attn.to_q"
GOOD = {f"{NAME}.lora_A.weight": torch.ones(2, 8), f"{NAME}.lora_B.weight": torch.ones(8, 2)}
CONFIG = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": ["to_q"]}
WRONG: dict[str, tuple[dict[str, Tensor], Any, type[Exception], str]] = {
    "no JSON": (GOOD, "{", CorruptFileError, "no JSON object"),
    "no object": (GOOD, "[1]", CorruptFileError, "no JSON object"),
    "another component's": (GOOD, {"unet.r": 2}, BindError, "no config for transformer"),
    "another rank": (GOOD, {**CONFIG, "transformer.r": 8}, BindError, "rank 2, and the config says 8"),
    "alpha twice": ({**GOOD, f"{NAME}.alpha": torch.tensor(1.0)}, CONFIG, BindError, "says alpha twice"),
    "half": ({f"{NAME}.lora_A.weight": torch.ones(2, 8)}, None, BindError, "has no lora_up"),
    "half, with a config": ({f"{NAME}.lora_A.weight": torch.ones(2, 8)}, CONFIG, BindError, "has no lora_B"),
    "an unknown option": (GOOD, {**CONFIG, "transformer.use_magic": True}, veneer.VeneerError, "use_magic"),
    "whole weights": ({**GOOD, f"{NAME}.diff": torch.ones(8, 8)}, None, UnsupportedError, "extract_lora_from_models"),
    "of no component": (
        {**GOOD, "proj_out.lora_A.weight": torch.ones(2, 8), "proj_out.lora_B.weight": torch.ones(4, 2)},
        CONFIG,
        BindError,
        "proj_out does not",
    ),
    "no layer": (
        {key.replace("to_q", "to_qq"): tensor for key, tensor in GOOD.items()},
        None,
        BindError,
        r"to_qq is no layer of .*Did you mean transformer_blocks.0.attn.to_q",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, what: str) -> None:
    tensors, config, kind, message = WRONG[what]
    base = bases.stored(tmp_path / "base", bases.flux())
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(tensors, tmp_path / "a.safetensors", metadata=None if config is None else {"lora_adapter_metadata": text})
    with pytest.raises(kind, match=message):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_what_comfyui_cannot_hold(tmp_path: Path) -> None:
    unet = bases.lora(tmp_path / "unet", {"conv_in": (4, 3, 3, 3)})
    with pytest.raises(UnsupportedError, match="--to kohya"):
        veneer.convert(unet, tmp_path / "out.safetensors", to="comfyui", component="unet")
    dora = bases.lora(tmp_path / "dora", {"proj_out": (4, 8)}, use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        veneer.convert(dora, tmp_path / "out.safetensors", to="comfyui", component="transformer")


def test_comfyuis_own_names(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    name = "diffusion_model.double_blocks.1.txt_attn.qkv"
    for spelling in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        tensors = {f"{name}.{spelling[0]}.weight": down, f"{name}.{spelling[1]}.weight": up}
        save_file(tensors, tmp_path / f"{spelling[0]}.safetensors")
        veneer.convert(tmp_path / f"{spelling[0]}.safetensors", tmp_path / spelling[0], base=base)
        parts = of_peft(tmp_path / spelling[0])
        change = torch.cat([parts[f"transformer_blocks.1.attn.add_{x}_proj"] for x in "qkv"])
        torch.testing.assert_close(change, product(up, down), rtol=1e-5, atol=1e-6)


def test_mixed_options_reach_every_target(tmp_path: Path) -> None:
    """From a file of diffusers to kohya's, without PEFT between."""
    from tests.formats.test_kohya import of_kohya

    base = bases.stored(tmp_path / "base", bases.unet())
    adapter = bases.lora(tmp_path / "adapter", bases.unet(), **MIXED, use_rslora=True)
    veneer.convert(adapter, tmp_path / "d.safetensors", to="diffusers", base=base)
    veneer.convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", to="kohya", base=base)
    expected = {path.replace(".", "_"): change for path, change in of_peft(adapter).items()}
    assert_same(of_kohya(tmp_path / "k.safetensors"), expected)
    veneer.convert(tmp_path / "k.safetensors", tmp_path / "d2.safetensors", to="diffusers", base=base)
    assert_same(of_diffusers(tmp_path / "d2.safetensors", "unet"), of_peft(adapter))


@pytest.mark.parametrize("name", ["lora_unet_conv_in.lora_down.weight", "unet.conv_in.lora_A.weight"])
def test_a_file_that_is_cut_off(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(4, 3, 3, 3)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in (0, 7, 40, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
            veneer.convert(tmp_path / "a.safetensors", tmp_path / "out")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from veneer.cli import main

    base = bases.stored(tmp_path / "base", bases.flux())
    adapter = bases.lora(tmp_path / "adapter", {"transformer_blocks.0.attn.to_q": (8, 8), "proj_out": (4, 8)})
    steps = ("kohya", "comfyui", "diffusers", "lycoris", "peft")
    source = adapter
    for to in steps:
        target = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        assert main(["convert", str(source), str(target), "--to", to, "--base", str(base)]) == 0
        source = target
    assert_same(of_peft(source), of_peft(adapter))
    assert "joined to layers as the model was published" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "kohya.safetensors"), str(tmp_path / "never")]) == 2
    assert "--base BASE" in capsys.readouterr().err
