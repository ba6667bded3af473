"""kohya's files: what they say of each weight, read independently of Veneer, is what PEFT's folder says."""

from __future__ import annotations

import importlib.util
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
from veneer.errors import BaseModelError, BindError, MergeError, UnsupportedError, UsageError

MIXED: dict[str, Any] = {"rank_pattern": {"to_q": 2, "conv1": 3}, "alpha_pattern": {"to_k": 5, "conv2": 2.5}}
OPTIONS = [{}, MIXED, {**MIXED, "use_rslora": True}, {"lora_alpha": 0}]
# A block of the tiny UNet -> the block of SDXL as it was published.
SDXL = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def product(up: Tensor, down: Tensor) -> Tensor:
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(up.shape[0], *down.shape[1:])


def of_peft(folder: Path) -> dict[str, Tensor]:
    """The change of each weight by PEFT's rules, from its files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alphas = (config.get("alpha_pattern") or {}).items()
        alpha = next((v for k, v in alphas if name.endswith(k.replace("\\", "").lstrip("^"))), config["lora_alpha"])
        scale = alpha / (down.shape[0] ** 0.5 if config.get("use_rslora") else down.shape[0])
        result[name] = scale * product(tensors[key.replace("lora_A", "lora_B")], down)
    return result


def of_kohya(file: Path, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """The change of each weight as kohya's scripts compute it, by its flat name."""
    tensors = load_file(file)
    result = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_down.weight") or not key.startswith(prefix):
            continue
        name = key.removesuffix(".lora_down.weight")
        scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
        result[name.removeprefix(prefix)] = scale * product(tensors[f"{name}.lora_up.weight"], down)
    return result


def in_sdxl(path: str) -> str:
    block = max((block for block in SDXL if path == block or path.startswith(block + ".")), key=len)
    inner = path[len(block) + 1 :]
    return f"{SDXL[block]}.{RESNET.get(inner, inner)}".rstrip(".")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("is_sdxl", [False, True])
def test_a_unet(tmp_path: Path, is_sdxl: bool, options: dict[str, Any]) -> None:
    shapes = bases.unet(is_sdxl)
    base = bases.stored(tmp_path / "base", shapes)
    adapter = bases.lora(tmp_path / "adapter", shapes, **options)
    report = veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=base)
    assert report.error == 0
    names = {path: (in_sdxl(path) if is_sdxl else path).replace(".", "_") for path in shapes}
    expected = of_peft(adapter)
    assert_same(of_kohya(tmp_path / "out.safetensors"), {names[path]: change for path, change in expected.items()})
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    assert_same(of_peft(tmp_path / "again"), expected)


def test_the_same_bytes_come_back(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.unet(True))
    adapter = bases.lora(tmp_path / "adapter", bases.unet(True), **MIXED, use_rslora=True)
    veneer.convert(adapter, tmp_path / "once")
    veneer.convert(tmp_path / "once", tmp_path / "out.safetensors", to="kohya", base=base)
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    configs, tensors = (
        [read(tmp_path / folder / name) for folder in ("once", "again")]
        for read, name in ((Path.read_bytes, "adapter_config.json"), (load_file, "adapter_model.safetensors"))
    )
    assert configs[0] == configs[1]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


FUSED = {
    "flux": {
        "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks_1_txt_attn_qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks_0_img_mod_lin": ["transformer_blocks.0.norm1.linear"],
        "double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.net.2"],
        "double_blocks_1_img_attn_proj": ["transformer_blocks.1.attn.to_out.0"],
        "single_blocks_0_linear1": [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
        "final_layer_linear": ["proj_out"],
        "final_layer_adaLN_modulation_1": ["norm_out.linear"],
    },
    "sd3": {
        "joint_blocks_0_x_block_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "joint_blocks_1_context_block_attn_qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
        "joint_blocks_0_x_block_attn2_qkv": [f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"],
        "joint_blocks_0_context_block_mlp_fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
        "joint_blocks_0_context_block_adaLN_modulation_1": ["transformer_blocks.0.norm1_context.linear"],
        "joint_blocks_1_context_block_adaLN_modulation_1": ["transformer_blocks.1.norm1_context.linear"],
        "x_embedder_proj": ["pos_embed.proj"],
        "final_layer_adaLN_modulation_1": ["norm_out.linear"],
    },
}
SWAPPED = ("final_layer_adaLN_modulation_1", "joint_blocks_1_context_block_adaLN_modulation_1")


@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_fused_layers(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    shapes = getattr(bases, model)()
    base = bases.stored(tmp_path / "base", shapes)
    adapter = bases.lora(tmp_path / "adapter", shapes, **options)
    veneer.convert(adapter, tmp_path / "out", to="kohya", base=base)
    file, expected = of_kohya(tmp_path / "out" / "lora.safetensors"), of_peft(adapter)
    assert sum(change.numel() for change in file.values()) == sum(change.numel() for change in expected.values())
    for name, paths in FUSED[model].items():
        change = torch.cat([expected[path] for path in paths])
        if name in SWAPPED:
            change = torch.cat([*reversed(change.chunk(2))])
        torch.testing.assert_close(file[name], change, rtol=1e-5, atol=1e-6)
    veneer.convert(tmp_path / "out", tmp_path / "again", base=base)
    assert_same(of_peft(tmp_path / "again"), expected)
    ranks = [
        {key: tensor.shape[0] for key, tensor in load_file(folder / "adapter_model.safetensors").items() if "_A" in key}
        for folder in (adapter, tmp_path / "again")
    ]
    assert ranks[0] == ranks[1]


def test_a_fused_layer_of_which_one_is_adapted(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    name = "transformer_blocks.0.attn.to_v"
    adapter = bases.lora(tmp_path / "adapter", {name: (8, 8)})
    veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=base)
    change = of_kohya(tmp_path / "out.safetensors")["double_blocks_0_img_attn_qkv"]
    assert not change[:16].any()
    torch.testing.assert_close(change[16:], of_peft(adapter)[name], rtol=1e-5, atol=1e-6)
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=base)
    assert_same(of_peft(tmp_path / "again"), of_peft(adapter))


def test_a_fused_layer_that_was_trained_as_one(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    name = "lora_unet_single_blocks_0_linear1"
    factors = {f"{name}.lora_down.weight": torch.randn(3, 8), f"{name}.lora_up.weight": torch.randn(56, 3)}
    save_file({**factors, f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "trained.safetensors")
    veneer.convert(tmp_path / "trained.safetensors", tmp_path / "peft", base=base)
    parts = of_peft(tmp_path / "peft")
    whole = of_kohya(tmp_path / "trained.safetensors")["single_blocks_0_linear1"]
    torch.testing.assert_close(
        torch.cat([parts[path] for path in FUSED["flux"]["single_blocks_0_linear1"]]), whole, rtol=1e-5, atol=1e-6
    )
    # The four layers share A, so that one layer of the same rank comes back, bit for bit.
    veneer.convert(tmp_path / "peft", tmp_path / "again.safetensors", to="kohya", base=base)
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in factors.items())


def of_half(alpha: Tensor | None, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{name}.lora_down.weight": torch.randn(3, 6), f"{name}.lora_up.weight": torch.randn(8, 3)}
    tensors = {key: tensor.to(dtype) for key, tensor in factors.items()}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": alpha}


@pytest.mark.parametrize(
    ("alpha", "scale", "note"),
    [
        (None, 1.0, "no alpha"),
        (torch.tensor(0.0), 1.0, "alpha 0"),
        (torch.tensor(1.5, dtype=torch.float16), 0.5, None),
        (torch.tensor([6.0], dtype=torch.bfloat16), 2.0, None),
    ],
)
def test_what_alpha_means(tmp_path: Path, alpha: Tensor | None, scale: float, note: str | None) -> None:
    base = bases.stored(tmp_path / "base", bases.unet())
    tensors = of_half(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    report = veneer.convert(tmp_path / "a.safetensors", tmp_path / "peft", base=base)
    down, up = (next(t for key, t in tensors.items() if part in key) for part in ("down.weight", "up.weight"))
    (change,) = of_peft(tmp_path / "peft").values()
    torch.testing.assert_close(change, scale * product(up, down), rtol=1e-6, atol=1e-6)
    assert next(iter(load_file(tmp_path / "peft" / "adapter_model.safetensors").values())).dtype == torch.float16
    assert (note is None and not report.notes) or (note is not None and note in report.notes[0])


def test_a_pipeline(tmp_path: Path) -> None:
    folder = bases.pipeline(tmp_path / "base", unet="UNet", text_encoder="CLIP", text_encoder_2="CLIP")
    bases.stored(folder / "unet", bases.unet(True))
    bases.clip(folder / "text_encoder")
    bases.clip(folder / "text_encoder_2", projection=True, width=12)
    layer = "encoder.layers.1.self_attn.out_proj"
    tensors = {}
    for name, width in (("te1", 8), ("te2", 12)):
        place = f"lora_{name}_text_model_{layer.replace('.', '_')}"
        tensors |= {
            f"{place}.lora_down.weight": torch.randn(2, width),
            f"{place}.lora_up.weight": torch.randn(width, 2),
        }
    place = "lora_unet_middle_block_1_proj_in"
    tensors |= {f"{place}.lora_down.weight": torch.randn(2, 8), f"{place}.lora_up.weight": torch.randn(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "all", base=folder)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["text_encoder", "text_encoder_2", "unet"]
    assert list(of_peft(tmp_path / "all" / "text_encoder")) == [layer]
    assert list(of_peft(tmp_path / "all" / "text_encoder_2")) == [f"text_model.{layer}"]
    assert of_peft(tmp_path / "all" / "unet")["mid_block.attentions.0.proj_in"].shape == (8, 8, 1, 1)
    veneer.convert(tmp_path / "all", tmp_path / "again.safetensors", to="kohya", base=folder)
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key].flatten(), tensor.flatten()) for key, tensor in tensors.items())
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "one", base=folder, component="text_encoder_2")
    assert list(of_peft(tmp_path / "one")) == [f"text_model.{layer}"]
    with pytest.raises(BindError, match=r"lora_te1_text_model\w+ names no module .*--component"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "none", base=folder / "unet")
    with pytest.raises(UsageError, match=r"no component 'transformer'.*unet, text_encoder"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "none", base=folder, component="transformer")


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_"])
@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj"])
def test_what_each_trainer_calls_a_module(tmp_path: Path, prefix: str, name: str) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    flat = prefix + name.replace(".", "_")
    save_file({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}, tmp_path / "a.safetensors")
    veneer.convert(tmp_path / "a.safetensors", tmp_path / "peft", base=base)
    assert_same(of_peft(tmp_path / "peft"), {"transformer_blocks.0.attn.to_out.0": product(up, down)})


def test_the_text_encoders_of_flux(tmp_path: Path) -> None:
    import transformers as tf

    folder = bases.pipeline(tmp_path / "base", transformer="Flux", text_encoder="CLIP", text_encoder_2="T5")
    bases.stored(folder / "transformer", bases.flux())
    bases.clip(folder / "text_encoder")
    config = tf.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    tf.T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    bases.lora(tmp_path / "all" / "text_encoder", {"encoder.layers.0.mlp.fc1": (16, 8)})
    bases.lora(tmp_path / "all" / "text_encoder_2", {t5: (8, 8)})
    bases.lora(tmp_path / "all" / "transformer", {"proj_out": (4, 8)})
    veneer.convert(tmp_path / "all", tmp_path / "out.safetensors", to="kohya", base=folder)
    names = {key.partition(".")[0] for key in load_file(tmp_path / "out.safetensors")}
    assert names == {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_unet_final_layer_linear",
    }
    veneer.convert(tmp_path / "out.safetensors", tmp_path / "again", base=folder)
    for component in ("text_encoder", "text_encoder_2", "transformer"):
        assert_same(of_peft(tmp_path / "again" / component), of_peft(tmp_path / "all" / component))
    own = {
        f"text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.{leaf}": tensor
        for leaf, tensor in (("lora_A.weight", torch.randn(2, 8)), ("lora_B.weight", torch.randn(16, 2)))
    }
    own |= {
        f"text_encoders.t5xxl.transformer.{t5}.{leaf}": tensor
        for leaf, tensor in (("lora_A.weight", torch.randn(2, 8)), ("lora_B.weight", torch.randn(8, 2)))
    }
    save_file(own, tmp_path / "comfyui.safetensors")
    veneer.convert(tmp_path / "comfyui.safetensors", tmp_path / "of-comfyui", base=folder)
    assert list(of_peft(tmp_path / "of-comfyui" / "text_encoder_2")) == [t5]


def test_metadata(tmp_path: Path) -> None:
    base = bases.stored(tmp_path / "base", bases.flux())
    adapter = bases.lora(tmp_path / "adapter", {"x_embedder": (8, 4)})
    veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=base)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "6",
    )


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{NAME}.lora_down.weight": torch.ones(2, 8), f"{NAME}.lora_up.weight": torch.ones(8, 2)}
WRONG: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "another name": (
        {key.replace("to_q", "to_qq"): tensor for key, tensor in GOOD.items()},
        BindError,
        r"to_qq names no module of the base\. Did you mean lora_unet_mid\w+to_q\?",
    ),
    "half of it": ({f"{NAME}.lora_down.weight": torch.ones(2, 8)}, BindError, r"to_q has no lora_up\.weight"),
    "another width": (
        {**GOOD, f"{NAME}.lora_down.weight": torch.ones(2, 9)},
        BindError,
        r"factors of shapes \[8, 2\] and \[2, 9\], and the base's weight is \[8, 8\]",
    ),
    "two ranks": ({**GOOD, f"{NAME}.lora_down.weight": torch.ones(4, 8)}, BindError, "factors of shapes"),
    "no leaf": ({**GOOD, f"{NAME}.lora_sideways.weight": torch.ones(1)}, BindError, "is no tensor of an adapter"),
    "two spellings": ({**GOOD, f"{NAME}.lora_A.weight": torch.ones(2, 8)}, BindError, "twice"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, what: str) -> None:
    tensors, kind, message = WRONG[what]
    base = bases.stored(tmp_path / "base", bases.unet())
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(kind, match=message):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_the_base_is_needed(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match="--base BASE"):
        veneer.convert(tmp_path / "a.safetensors", tmp_path / "out")
    adapter = bases.lora(tmp_path / "adapter", {"x_embedder": (8, 4)})
    with pytest.raises(BaseModelError, match="--base BASE"):
        veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya")


def test_what_kohya_has_no_name_for(tmp_path: Path) -> None:
    shapes: bases.Shapes = {"blocks.0.attn.to_q": (8, 8)}
    base = bases.stored(tmp_path / "base", shapes)
    adapter = bases.lora(tmp_path / "adapter", shapes)
    with pytest.raises(UnsupportedError, match=r"not known here.*--to diffusers, --to comfyui or"):
        veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=base)
    flux = bases.stored(tmp_path / "flux", bases.flux())
    with pytest.raises(UnsupportedError, match=r"no name for 1 of the adapter's modules: blocks.0.attn.to_q"):
        veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=flux)
    dora = bases.lora(tmp_path / "dora", {"x_embedder": (8, 4)}, use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        veneer.convert(dora, tmp_path / "out.safetensors", to="kohya", base=flux)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_base_of_diffusers(tmp_path: Path) -> None:
    folder = bases.pipeline(tmp_path / "pipe", unet="UNet2DConditionModel")
    base = bases.stored(folder / "unet", bases.unet())
    (base / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    adapter = bases.lora(tmp_path / "adapter", {"conv_out": (3, 4, 3, 3)})
    veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=folder)
    with pytest.raises(BaseModelError, match=r"is a pipeline of several models.*adapter is for: unet"):
        veneer.load(tmp_path / "out.safetensors", base=folder)
    with pytest.raises(MergeError, match=r"merged in memory.*merge=True\)\.save_pretrained"):
        veneer.merge(tmp_path / "out.safetensors", base, out=tmp_path / "merged")
    if importlib.util.find_spec("diffusers") is None:
        with pytest.raises(BaseModelError, match="needs diffusers"):
            veneer.load(tmp_path / "out.safetensors", base=base)
    both = bases.pipeline(tmp_path / "both", unet="UNet2DConditionModel", transformer="Transformer")
    for name in ("unet", "transformer"):
        bases.stored(both / name, bases.unet())
    with pytest.raises(UsageError, match=r"which component of a pipeline the adapter is for.*--component unet"):
        veneer.convert(adapter, tmp_path / "never.safetensors", to="kohya", base=both)
    veneer.convert(adapter, tmp_path / "named.safetensors", to="kohya", base=both, component="unet")
    with pytest.raises(BaseModelError, match="no component 'text_encoder'"):
        veneer.convert(adapter, tmp_path / "never.safetensors", to="kohya", base=both, component="text_encoder")
    assert not (tmp_path / "never.safetensors").exists()


def test_a_file_for_a_model_in_memory(tmp_path: Path) -> None:
    layer = "mid_block.attentions.0"
    base = bases.stored(tmp_path / "base", {f"{layer}.proj_in": (6, 4), "down_blocks.0.x": (4, 4)})
    adapter = bases.lora(tmp_path / "adapter", {f"{layer}.proj_in": (6, 4)})
    veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=base)
    model = torch.nn.Module()
    for name, shape in (("mid_block", (4, 6)), ("down_blocks", (4, 4))):
        inner = torch.nn.ModuleDict({"proj_in" if name == "mid_block" else "x": torch.nn.Linear(*shape)})
        blocks = torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([inner])}) if name == "mid_block" else [inner]
        model.add_module(name, blocks if isinstance(blocks, torch.nn.Module) else torch.nn.ModuleList(blocks))
    before = model.get_submodule(f"{layer}.proj_in").weight.detach().double()
    merged = veneer.PeftModel.from_pretrained(model, tmp_path / "out.safetensors").merge_and_unload()
    change = merged.get_submodule(f"{layer}.proj_in").weight.detach().double() - before
    torch.testing.assert_close(change, of_peft(adapter)[f"{layer}.proj_in"], rtol=1e-5, atol=1e-5)
