"""Tiny image models as folders: the shapes of their weights, in the modules that diffusers gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import veneer
from veneer.base_model.targets import pattern_value

Shapes = dict[str, tuple[int, ...]]


def attention(name: str, width: int, context: int | None = None) -> Shapes:
    inner = context or width
    return {
        f"{name}.to_q": (width, width),
        f"{name}.to_k": (width, inner),
        f"{name}.to_v": (width, inner),
        f"{name}.to_out.0": (width, width),
    }


def unet_block(name: str, width: int) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    return {
        f"{name}.proj_in": (width, width, 1, 1),
        **attention(f"{block}.attn1", width),
        **attention(f"{block}.attn2", width, 6),
        f"{block}.ff.net.0.proj": (8 * width, width),
        f"{block}.ff.net.2": (width, 4 * width),
        f"{name}.proj_out": (width, width, 1, 1),
    }


def resnet(name: str, inputs: int, width: int) -> Shapes:
    return {
        f"{name}.conv1": (width, inputs, 3, 3),
        f"{name}.time_emb_proj": (width, 10),
        f"{name}.conv2": (width, width, 3, 3),
        f"{name}.conv_shortcut": (width, inputs, 1, 1),
    }


def unet(sdxl: bool = False) -> Shapes:
    """A UNet of two levels with two layers each; attention is on the second, as in SDXL's first ones."""
    shapes: Shapes = {
        "conv_in": (4, 3, 3, 3),
        "time_embedding.linear_1": (10, 4),
        "time_embedding.linear_2": (10, 10),
        **resnet("down_blocks.0.resnets.0", 4, 4),
        **resnet("down_blocks.0.resnets.1", 4, 4),
        "down_blocks.0.downsamplers.0.conv": (4, 4, 3, 3),
        **resnet("down_blocks.1.resnets.0", 4, 8),
        **resnet("down_blocks.1.resnets.1", 8, 8),
        **unet_block("down_blocks.1.attentions.0", 8),
        **unet_block("down_blocks.1.attentions.1", 8),
        **resnet("mid_block.resnets.0", 8, 8),
        **unet_block("mid_block.attentions.0", 8),
        **resnet("mid_block.resnets.1", 8, 8),
        **resnet("up_blocks.0.resnets.0", 16, 8),
        **resnet("up_blocks.0.resnets.1", 16, 8),
        **resnet("up_blocks.0.resnets.2", 12, 8),
        **unet_block("up_blocks.0.attentions.0", 8),
        **unet_block("up_blocks.0.attentions.1", 8),
        **unet_block("up_blocks.0.attentions.2", 8),
        "up_blocks.0.upsamplers.0.conv": (8, 8, 3, 3),
        **resnet("up_blocks.1.resnets.0", 12, 4),
        "conv_out": (3, 4, 3, 3),
    }
    added: Shapes = {"add_embedding.linear_1": (10, 12), "add_embedding.linear_2": (10, 10)}
    return {**shapes, **added} if sdxl else shapes


def joint_attention(name: str, width: int) -> Shapes:
    added = {f"{name}.{layer}": (width, width) for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    return {**attention(name, width), **added}


TIME: Shapes = {
    f"time_text_embed.{part}.linear_{number}": (8, columns if number == 1 else 8)
    for part, columns in (("timestep_embedder", 5), ("text_embedder", 6))
    for number in (1, 2)
}


def joint_block(name: str, width: int = 8) -> Shapes:
    return {
        f"{name}.norm1.linear": (6 * width, width),
        f"{name}.norm1_context.linear": (6 * width, width),
        **joint_attention(f"{name}.attn", width),
        **{f"{name}.{ff}.net.0.proj": (4 * width, width) for ff in ("ff", "ff_context")},
        **{f"{name}.{ff}.net.2": (width, 4 * width) for ff in ("ff", "ff_context")},
    }


def flux() -> Shapes:
    single = "single_transformer_blocks.0"
    return {
        **TIME,
        "context_embedder": (8, 7),
        "x_embedder": (8, 4),
        **joint_block("transformer_blocks.0"),
        **joint_block("transformer_blocks.1"),
        f"{single}.norm.linear": (24, 8),
        f"{single}.proj_mlp": (32, 8),
        f"{single}.proj_out": (8, 40),
        **{f"{single}.attn.{layer}": (8, 8) for layer in ("to_q", "to_k", "to_v")},
        "norm_out.linear": (16, 8),
        "proj_out": (4, 8),
    }


def sd3() -> Shapes:
    last = {key: shape for key, shape in joint_block("transformer_blocks.1").items() if "ff_context" not in key}
    del last["transformer_blocks.1.attn.to_add_out"]
    last["transformer_blocks.1.norm1_context.linear"] = (16, 8)
    return {
        **TIME,
        "pos_embed.proj": (8, 4, 2, 2),
        "context_embedder": (8, 7),
        **joint_block("transformer_blocks.0"),
        **attention("transformer_blocks.0.attn2", 8),
        **last,
        "norm_out.linear": (16, 8),
        "proj_out": (4, 8),
    }


def stored(folder: Path, shapes: Shapes, biased: Iterable[str] = (), seed: int = 0) -> Path:
    """Write a model's weights, in the folder of a component."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.zeros(shapes[name][0]) for name in biased}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def clip(folder: Path, projection: bool = False, width: int = 8) -> Path:
    """Write a text encoder of CLIP."""
    import transformers as tf

    config = tf.CLIPTextConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel
    kind(config).save_pretrained(folder)
    return folder


def pipeline(folder: Path, **parts: str) -> Path:
    """Write the index of a pipeline whose components are there."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "Pipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def lora(folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 1, **options: object) -> Path:
    """Write a LoRA of PEFT's for layers of these shapes: r is 4, and as ``rank_pattern`` says."""
    config = veneer.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(shapes), **options})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out, inner, *kernel) in shapes.items():
        rank = pattern_value(name, config.rank_pattern, config.r)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inner, *kernel, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        if config.use_dora:
            shape = (1, out, 1, 1) if kernel else (out,)
            tensors[f"{prefix}.lora_magnitude_vector"] = torch.rand(shape, generator=generator) + 0.5
    return adapter(folder, config.to_dict(), tensors)


def adapter(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter of PEFT's."""
    folder.mkdir(parents=True)
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder
