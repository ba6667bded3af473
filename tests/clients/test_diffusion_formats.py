"""Files that `veneer convert` writes, loaded by diffusers: models answer as with PEFT's folder in Veneer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

import veneer
from tests.clients import pipelines as make
from tests.formats import diffusion_bases as bases
from veneer.formats.format import Base
from veneer.formats.network_modules import layers, published_modules

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (*ATTENTION, "proj_in", "proj_out", "net.2", "conv1", "conv2", "conv_in", "conv_out", "linear_1", "time_emb_proj")
MIXED: dict[str, Any] = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 5}}


def shapes_of(model: nn.Module, endings: Iterable[str]) -> bases.Shapes:
    kinds = (nn.Linear, nn.Conv2d)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {
        name: tuple(module.weight.shape)
        for name, module in layers.items()
        if any(name == ending or name.endswith(f".{ending}") for ending in endings)
    }


def unet_output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, model.config.cross_attention_dim, generator=generator)
    added = None
    if model.config.addition_embed_type:
        added = {"text_embeds": torch.randn(1, 8, generator=generator), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        return model(sample, 3, text, added_cond_kwargs=added).sample


def flux_output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**make.flux_inputs(), return_dict=False)[0]


def sdxl() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    ).eval()


def in_veneer(model: nn.Module, adapter: Path) -> Any:
    return veneer.PeftModel.from_pretrained(model, adapter).eval()


def assert_as_in_veneer(answer: Tensor, base: Tensor, adapted: Tensor) -> None:
    assert not torch.allclose(base, adapted, atol=1e-2)
    torch.testing.assert_close(answer, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "endings", "options"),
    [
        ("diffusers", ALL, MIXED),
        ("diffusers", ALL, {**MIXED, "use_rslora": True}),
        ("diffusers", ATTENTION, {"use_dora": True}),
        # diffusers 0.42 keeps one alpha of a UNet in kohya's format, and so does this.
        ("kohya", ATTENTION, {"rank_pattern": {"to_q": 2}}),
        ("kohya", (*ATTENTION, "proj_in", "proj_out", "net.2", "conv1", "time_emb_proj"), {}),
    ],
)
def test_a_unet(tmp_path: Path, to: str, endings: tuple[str, ...], options: dict[str, Any]) -> None:
    model = make.unet()
    adapter = bases.lora(tmp_path / "adapter", shapes_of(model, endings), **options)
    veneer.convert(adapter, tmp_path / "out.safetensors", to=to, base=model)
    base, adapted = unet_output(model), unet_output(in_veneer(make.unet(), adapter))
    pipeline = make.stable_diffusion(tmp_path)
    pipeline.load_lora_weights(str(tmp_path / "out.safetensors"))
    assert_as_in_veneer(unet_output(pipeline.unet), base, adapted)


def test_sdxls_published_names(tmp_path: Path) -> None:
    model = sdxl()
    layers = shapes_of(model, (*ATTENTION, "proj_in", "net.2", "conv1", "conv2", "conv_shortcut", "conv_in", "conv"))
    adapter = bases.lora(tmp_path / "adapter", layers, rank_pattern={"to_q": 2})
    veneer.convert(adapter, tmp_path / "out.safetensors", to="kohya", base=model)
    base, adapted = unet_output(model), unet_output(in_veneer(sdxl(), adapter))
    loader = diffusers.StableDiffusionXLPipeline
    state, alphas = loader.lora_state_dict(str(tmp_path / "out.safetensors"), unet_config=model.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=model)
    assert_as_in_veneer(unet_output(model), base, adapted)


@pytest.mark.parametrize(
    ("to", "endings", "options"),
    [
        ("diffusers", make.FLUX_TARGETS, {**MIXED, "use_rslora": True}),
        ("diffusers", make.FLUX_TARGETS, {"use_dora": True}),
        ("comfyui", (*make.FLUX_TARGETS, "proj_mlp", "norm.linear", "norm_out.linear"), MIXED),
        ("kohya", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "to_add_out", "norm1.linear"), {}),
        ("kohya", ("add_q_proj", "add_v_proj"), {"rank_pattern": {"add_v_proj": 2}}),
    ],
)
def test_flux(tmp_path: Path, to: str, endings: tuple[str, ...], options: dict[str, Any]) -> None:
    model = make.flux()
    adapter = bases.lora(tmp_path / "adapter", shapes_of(model, endings), **options)
    veneer.convert(adapter, tmp_path / "out.safetensors", to=to, base=model)
    base, adapted = flux_output(model), flux_output(in_veneer(make.flux(), adapter))
    pipeline = make.flux_pipeline()
    pipeline.load_lora_weights(str(tmp_path / "out.safetensors"))
    assert_as_in_veneer(flux_output(pipeline.transformer), base, adapted)


def test_a_text_encoder(tmp_path: Path) -> None:
    def answer(model: Any) -> Tensor:
        with torch.no_grad():
            return model(torch.arange(6)[None]).last_hidden_state

    text = shapes_of(make.text_encoder(), ("q_proj", "out_proj", "fc1"))
    bases.lora(tmp_path / "all" / "text_encoder", text, rank_pattern={"q_proj": 2})
    bases.lora(tmp_path / "all" / "unet", shapes_of(make.unet(), ATTENTION))
    pipeline = make.stable_diffusion(tmp_path)
    veneer.convert(tmp_path / "all", tmp_path / "out.safetensors", to="diffusers")
    base = answer(pipeline.text_encoder)
    adapted = answer(in_veneer(make.text_encoder(), tmp_path / "all" / "text_encoder"))
    pipeline.load_lora_weights(str(tmp_path / "out.safetensors"))
    assert_as_in_veneer(answer(pipeline.text_encoder), base, adapted)


def test_what_diffusers_saves(tmp_path: Path) -> None:
    pipeline = make.stable_diffusion(tmp_path)
    pipeline.load_lora_weights(make.lora_of(make.unet(), "unet"), adapter_name="a")
    pipeline.unet.peft_config["a"].lora_alpha = 4
    parts = {
        "unet_lora_layers": make.lora_of(make.unet(), ""),
        "unet_lora_adapter_metadata": {"r": 4, "lora_alpha": 12},
    }
    parts["unet_lora_layers"] = {k.removeprefix("."): t for k, t in parts["unet_lora_layers"].items()}
    parts["unet_lora_adapter_metadata"]["target_modules"] = list(make.UNET_TARGETS)
    pipeline.save_lora_weights(tmp_path / "saved", **parts)
    again = make.stable_diffusion(tmp_path)
    again.load_lora_weights(str(tmp_path / "saved"))
    adapted = unet_output(again.unet)
    assert_as_in_veneer(unet_output(in_veneer(make.unet(), tmp_path / "saved")), unet_output(make.unet()), adapted)


def test_a_base_by_its_folder(tmp_path: Path) -> None:
    make.unet().save_pretrained(tmp_path / "pipe" / "unet")
    bases.pipeline(tmp_path / "pipe", unet="UNet2DConditionModel")
    base = tmp_path / "pipe" / "unet"
    adapter = bases.lora(tmp_path / "adapter", shapes_of(make.unet(), ATTENTION), use_dora=True)
    veneer.convert(adapter, tmp_path / "out.safetensors", to="lycoris", base=tmp_path / "pipe")
    adapted = unet_output(in_veneer(make.unet(), adapter))
    model = veneer.load(tmp_path / "out.safetensors", base=base)
    assert_as_in_veneer(unet_output(model), unet_output(make.unet()), adapted)
    veneer.load(tmp_path / "out.safetensors", base=base, merge=True).save_pretrained(tmp_path / "merged")
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(unet_output(merged), adapted, rtol=1e-4, atol=1e-4)
    # kohya's format has no DoRA; of full rank the plain LoRA is the same change.
    veneer.convert(
        tmp_path / "out.safetensors", tmp_path / "k.safetensors", to="kohya", base=base, as_lora=True, rank=16
    )
    model = in_veneer(make.unet(), tmp_path / "k.safetensors")
    torch.testing.assert_close(unet_output(model), adapted, rtol=1e-3, atol=1e-3)
    with pytest.raises(veneer.VeneerError, match="no_such_option"):
        veneer.load(tmp_path / "out.safetensors", base=base, no_such_option=1)


class WithoutNorms(dict[str, Tensor]):
    """A published checkpoint of which the norms are left out."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6)

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key) if key in self else self[key]


def levels(**options: Any) -> Any:
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    sizes = {"layers_per_block": 2, "cross_attention_dim": 12, "norm_num_groups": 4, "attention_head_dim": 4}
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    blocks = {"block_out_channels": (8, 16, 24), "down_block_types": down, "up_block_types": up}
    return diffusers.UNet2DConditionModel(**blocks, **sizes, **options)


def sd3() -> Any:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    widths = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 10, "pooled_projection_dim": 7}
    return diffusers.SD3Transformer2DModel(
        num_layers=3, caption_projection_dim=16, dual_attention_layers=(0, 1), **sizes, **widths
    )


def real_width_of_flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=1536,
        joint_attention_dim=10,
        pooled_projection_dim=7,
        guidance_embeds=True,
    )


XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}


@pytest.mark.parametrize("model", ["sd", "sdxl", "flux", "sd3"])
def test_every_layer_has_its_published_name(model: str) -> None:
    """diffusers' own conversion of published checkpoints undoes the names, the joining and the swapping."""
    made = {"sd": levels, "sdxl": lambda: levels(**XL), "flux": real_width_of_flux, "sd3": sd3}[model]()
    base = Base("base", {}, {name: tuple(p.shape) for name, p in made.named_parameters()})
    state, published = made.state_dict(), WithoutNorms()
    modules = published_modules(base)
    for module, leaf in itertools.product(modules, ("weight", "bias")):
        parts = [state[f"{path}.{leaf}"] for path in module.paths if f"{path}.{leaf}" in state]
        if parts:
            whole = torch.cat(parts)
            whole = torch.cat([*reversed(whole.chunk(2))]) if module.is_swapped else whole
            published[f"model.diffusion_model.{module.name}.{leaf}"] = whole
    converted = {
        "flux": lambda: single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(published),
        "sd3": lambda: single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(published),
    }.get(model, lambda: single_file_utils.convert_ldm_unet_checkpoint(published, dict(made.config)))()
    assert {path for module in modules for path in module.paths} == set(layers(base))
    for path in layers(base):
        assert torch.equal(converted[f"{path}.weight"], state[f"{path}.weight"]), path
