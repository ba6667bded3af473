"""Tiny models of the kinds that MLX-LM names, several heads and fewer heads of keys, from their configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

TEXT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_ROUTED = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "num_hidden_layers": 4,
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 24}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 64, "tie_word_embeddings": False}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}

_PLAIN = (
    *("apertus", "ernie4_5", "gemma3_text", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral"),
    *("nemotron", "olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", "glm4"),
)
# Model type -> its config's values.
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_PLAIN, TEXT),
    **{name: {**TEXT, "tie_word_embeddings": True} for name in ("cohere", "gemma", "gemma2")},
    "cohere2": {**TEXT, "tie_word_embeddings": True, "num_hidden_layers": 4},
    "exaone4": {**TEXT, "num_hidden_layers": 4},
    "gemma3_text": {**TEXT, "num_hidden_layers": 6, "tie_word_embeddings": True},
    "gemma4_text": {**TEXT, "tie_word_embeddings": True, "vocab_size_per_layer_input": 64},
    "phi": {**TEXT, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "stablelm": {**TEXT, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "gpt2": {**_GPT, "tie_word_embeddings": True, "num_key_value_heads": 4, "n_ctx": 64},
    "gpt_bigcode": {**_GPT, "n_inner": 48, "num_key_value_heads": 1},
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": {**TEXT, "intermediate_size": 128, "head_dim": None, "num_key_value_heads": 4},
    **{name: {**TEXT, **_EXPERTS, **_ROUTED} for name in ("dots1", "glm4_moe")},
    "deepseek_v3": {
        **{**TEXT, **_EXPERTS, **_ROUTED, "num_key_value_heads": 4},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    },
    "lfm2": {
        **{**TEXT, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        **{"tie_word_embeddings": True, "block_auto_adjust_ff_dim": False},
    },
    "gpt_oss": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**TEXT, "num_local_experts": 4},
    "olmoe": {**TEXT, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**TEXT, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {**TEXT, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**TEXT, **_EXPERTS},
    "qwen3_next": {**TEXT, **_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 24},
    "gemma3": {
        "text_config": {**TEXT, "num_hidden_layers": 6, "tie_word_embeddings": True},
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
        **{"mm_tokens_per_image": 4, "vocab_size": 64},
    },
    "gemma4": {
        "text_config": {**TEXT, "tie_word_embeddings": True, "vocab_size_per_layer_input": 64},
        "vocab_size": 64,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral"},
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, **_MROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
    },
    "qwen2_5_vl": {"text_config": {**TEXT, **_MROPE}, "vision_config": {**_PATCHES, "fullatt_block_indexes": [0]}},
    "qwen3_5_moe": {
        "text_config": {**TEXT, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 24},
        "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **_MROPE, **_EXPERTS},
        "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {"text_config": {**TEXT, **_LINEAR}, "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0]}},
    "qwen3_vl": {"text_config": {**TEXT, **_MROPE}, "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0]}},
}
WITH_IMAGES = (
    *("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen2_vl"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
)


def family(model_type: str, **values: Any) -> nn.Module:
    """A model of a kind, with random weights of ordinary size."""
    config = tf.AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **values})
    kind = tf.AutoModelForImageTextToText if model_type in WITH_IMAGES else tf.AutoModelForCausalLM
    torch.manual_seed(0)
    model: nn.Module = kind.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def saved_family(folder: Path, model_type: str, **values: Any) -> Path:
    """A folder with such a model."""
    model: Any = family(model_type, **values)
    model.save_pretrained(folder)
    return folder
