"""Tiny pipelines of diffusers, and LoRA files for them: a UNet with a text encoder, and a transformer (Flux)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from torch import Tensor, nn

UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "proj_in", "proj_out", "conv", "time_emb_proj")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
FLUX_TARGETS = (*UNET_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()


def text_encoder() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return tf.CLIPTextModel(
        tf.CLIPTextConfig(vocab_size=2 + 2 * 94, max_position_embeddings=77, **sizes, **ends)
    ).eval()


def tokenizer(folder: Path) -> Any:
    """Make CLIP's tokenizer with the letters for its vocabulary."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return tf.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def stable_diffusion(folder: Path) -> Any:
    """Make a pipeline of a UNet, a text encoder and an image decoder."""
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
    ).eval()
    parts = {"vae": vae, "text_encoder": text_encoder(), "tokenizer": tokenizer(folder), "unet": unet()}
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline: Any, **options: Any) -> float:
    """Return the sum of what a pipeline paints."""
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    return float(pipeline("a cat", generator=generator, **size, **options).images.abs().sum())


def flux(channels: int = 16) -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def flux2(heads: int = 2, layers: int = 2) -> Any:
    torch.manual_seed(heads)
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_single_layers=layers + 1,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=8,
        timestep_guidance_channels=8,
        mlp_ratio=2.0,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    ).eval()


def flux2_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    hidden, prompt = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 4), (1, 3, 8)))
    places = {"img_ids": torch.zeros(1, 4, 4), "txt_ids": torch.zeros(1, 3, 4)}
    return {"hidden_states": hidden, "encoder_hidden_states": prompt, "timestep": torch.tensor([0.5]), **places}


def flux_pipeline(transformer: Any = None) -> Any:
    """Make a pipeline of a transformer alone: prompts and latents are given to it as tensors."""
    vae = diffusers.AutoencoderKL(block_out_channels=[4], norm_num_groups=2).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer or flux(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_inputs(channels: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden, prompt, pooled = (torch.randn(*shape, generator=generator) for shape in ((1, 16, 16), (1, 6, 32), (1, 32)))
    return {
        "hidden_states": hidden.repeat(1, 1, channels // 16),
        "encoder_hidden_states": prompt,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def flux_output(transformer: Any, channels: int = 16, **options: Any) -> float:
    with torch.no_grad():
        return float(transformer(**flux_inputs(channels), return_dict=False, **options)[0].abs().sum())


def lora_of(
    model: nn.Module, part: str, targets: Iterable[str] = UNET_TARGETS, rank: int = 4, seed: int = 1
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of a part of a pipeline, as a file of diffusers has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(tuple(f".{target}" for target in targets)):
            out, *inner = module.weight.shape
            shapes[f"{part}.{name}.lora_A.weight"] = (rank, *inner)
            shapes[f"{part}.{name}.lora_B.weight"] = (out, rank, *(1 for _ in inner[1:]))
    return drawn(shapes, seed)


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.4 for key, shape in sorted(shapes.items())}


def kohya(rank: int = 4, alpha: float = 2.0) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of a UNet as kohya's scripts name them."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in lora_of(unet(), "lora_unet", rank=rank).items():
        name, _, matrix = key.removesuffix(".weight").rpartition(".")
        name = name.replace(".", "_")
        tensors[f"{name}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def drawn_adapter(model: nn.Module, seed: int = 5) -> Any:
    """Give the tensors of a model's adapters values that do not depend on who made them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in ("lora_", "lokr_", "hada_")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model
