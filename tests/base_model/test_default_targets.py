"""The layers that a config without targets means, for each model type that has a usual choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import veneer
from tests.models import BLOCKS
from veneer.base_model.targets import DEFAULTS, names_match

# Sizes by the names that one family or another has for them; each config takes what it knows.
SIZES: dict[str, Any] = {
    **BLOCKS,
    **{"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1},
    **{"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32},
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_ff": 40, "d_kv": 8, "num_layers": 2},
    **{"num_heads": 4, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_layers": 2, "n_heads": 4, "ffn_dim": 40},
    **{"rotary_dim": 8, "word_embed_proj_dim": 32, "num_local_experts": 2, "image_size": 16, "patch_size": 8},
    **{"attention_types": [[["global"], 2]], "num_mel_bins": 8, "max_source_positions": 16},
    **{"max_target_positions": 16, "attention_dim": 32},
}


def tiny(model_type: str) -> nn.Module:
    """A model of a type, from its config alone."""
    kind = tf.CONFIG_MAPPING[model_type]
    known = set(kind().to_dict())
    config = kind(**{name: value for name, value in SIZES.items() if name in known})
    with torch.device("meta"):
        model: nn.Module = tf.AutoModel.from_config(config)
    return model


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_each_name_of_a_usual_choice_is_a_layer_of_its_models(model_type: str) -> None:
    names = [name for name, module in tiny(model_type).named_modules() if not list(module.children())]
    for ending in DEFAULTS[model_type]:
        assert any(names_match(name, [ending]) for name in names), f"no {ending} in {names}"


def test_vit_has_a_usual_choice_under_the_names_of_today() -> None:
    config = tf.ViTConfig(**BLOCKS, intermediate_size=40, image_size=16, patch_size=8)
    model = veneer.get_peft_model(tf.ViTForImageClassification(config), veneer.LoraConfig())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert len(model.adapters.get("default").layers) == 4
