"""The layers that a config without targets means, for each model type that has a usual choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft.utils import constants
from torch import nn

import veneer
from tests.models import BLOCKS, build, inputs, logits
from veneer.base_model.default_targets import DEFAULTS, default_feedforward, default_targets
from veneer.base_model.targets import names_match

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


# Their code is not in transformers, or they are made of several models.
ELSEWHERE = {"RefinedWeb", "RefinedWebModel", "blip-2", "btlm", "chatglm", "gemma4", "rwkv7"}
# In transformers 5 its attention has other names than those of peft's choice; llava's choice has modules of all kinds.
OTHER = {"vit", "llava"}
TABLES = {
    str(kind.value): tuner.target_module_mapping
    for kind, tuner in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()
    if getattr(tuner, "target_module_mapping", None)
} | {"IA3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING}


@pytest.mark.parametrize("peft_type", TABLES)
def test_a_method_has_peers_usual_choice_for_each_model_type(peft_type: str) -> None:
    for model_type, names in TABLES[peft_type].items():
        own = default_targets(peft_type, model_type)
        if model_type not in OTHER:
            assert own is not None, model_type
            assert own == names if isinstance(names, str) else own == set(names), model_type


def test_the_feedforward_layers_are_peers() -> None:
    for model_type, names in constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items():
        assert (default_feedforward(model_type) or set()) == set(names)


@pytest.mark.parametrize("targets", [None, ["k_proj", "mlp.down_proj"], ["k_proj", "o_proj"], ".*(k_proj|down_proj)"])
def test_ia3_scales_the_input_of_the_layers_that_peft_does(targets: Any) -> None:
    own = veneer.get_peft_model(build("llama"), veneer.IA3Config(target_modules=targets))
    peer = peft.get_peft_model(build("llama"), peft.IA3Config(target_modules=targets))
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (veneer.get_peft_model_state_dict(own), peft.get_peft_model_state_dict(peer))
    ]
    assert shapes[0] == shapes[1]


def test_a_config_that_leaves_the_feedforward_layers_out_loads_what_was_made_from_it(tmp_path: Path) -> None:
    config = veneer.IA3Config(init_ia3_weights=False)
    model = veneer.get_peft_model(build("llama"), config, seed=1).eval()
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(build("llama"), tmp_path, config=config)
    assert torch.equal(logits(loaded, inputs("llama")), logits(model, inputs("llama")))


@pytest.mark.parametrize("model_type", sorted(DEFAULTS.keys() - ELSEWHERE))
def test_each_name_of_a_usual_choice_is_a_layer_of_its_models(model_type: str) -> None:
    names = [name for name, module in tiny(model_type).named_modules() if not list(module.children())]
    for ending in DEFAULTS[model_type]:
        assert any(names_match(name, [ending]) for name in names), f"no {ending} in {names}"


def test_vit_has_a_usual_choice_under_the_names_of_today() -> None:
    config = tf.ViTConfig(**BLOCKS, intermediate_size=40, image_size=16, patch_size=8)
    model = veneer.get_peft_model(tf.ViTForImageClassification(config), veneer.LoraConfig())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert len(model.adapters.get("default").layers) == 4
