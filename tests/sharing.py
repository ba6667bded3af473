"""Tiny encoder-decoders whose modules share one weight: an embedding for each half, and the output layer.

build("bart")      a fresh copy: float32, in eval mode, the same weights on every run
feed("bart")       a batch of two rows for it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as tf
from torch import Tensor

TEXT: Mapping[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5: Mapping[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_BART: Mapping[str, Any] = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 2,
}
_SPARSE: Mapping[str, Any] = {"num_experts": 2, "expert_capacity": 64}
_PROPHET: Mapping[str, Any] = {
    **TEXT,
    "hidden_size": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 1,
}
_GEMMA: Mapping[str, Any] = {
    **TEXT,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


def _t5gemma() -> torch.nn.Module:
    config = tf.T5GemmaConfig(encoder=dict(_GEMMA), decoder=dict(_GEMMA), vocab_size=99, dropout_rate=0.0)
    return tf.T5GemmaForConditionalGeneration(config)


CLASSES: Mapping[str, Callable[[], torch.nn.Module]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5 encoder": lambda: tf.T5EncoderModel(tf.T5Config(**_T5)),
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**_T5)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**_T5)),
    "longt5": lambda: tf.LongT5ForConditionalGeneration(tf.LongT5Config(**_T5, local_radius=7)),
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(**_T5, **_SPARSE, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    ),
    "udop": lambda: tf.UdopForConditionalGeneration(
        tf.UdopConfig(**_T5, max_2d_position_embeddings=32, image_size=16, patch_size=4)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
    "mbart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**_BART)),
    "m2m100": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**_BART)),
    "nllb-moe": lambda: tf.NllbMoeForConditionalGeneration(
        tf.NllbMoeConfig(**_BART, **_SPARSE, encoder_sparse_step=2, decoder_sparse_step=2)
    ),
    "mvp": lambda: tf.MvpForConditionalGeneration(tf.MvpConfig(**_BART)),
    "plbart": lambda: tf.PLBartForConditionalGeneration(tf.PLBartConfig(**_BART)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_BART)),
    "pegasus-x": lambda: tf.PegasusXForConditionalGeneration(tf.PegasusXConfig(**_BART, block_size=8)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_BART)),
    "blenderbot": lambda: tf.BlenderbotForConditionalGeneration(tf.BlenderbotConfig(**_BART)),
    "blenderbot-small": lambda: tf.BlenderbotSmallForConditionalGeneration(tf.BlenderbotSmallConfig(**_BART)),
    "bigbird-pegasus": lambda: tf.BigBirdPegasusForConditionalGeneration(
        tf.BigBirdPegasusConfig(**_BART, attention_type="original_full")
    ),
    "led": lambda: tf.LEDForConditionalGeneration(
        tf.LEDConfig(
            **_BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4
        )
    ),
    "prophetnet": lambda: tf.ProphetNetForConditionalGeneration(tf.ProphetNetConfig(**_PROPHET)),
    "t5gemma": _t5gemma,
}

# The layers between: every attention's query.
BETWEEN = r".*\.(q|q_proj|query_proj)"
_IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [11, 5, 30, 6, 17, 2]])
_DECODER_IDS = torch.tensor([[2, 9, 5, 40], [2, 6, 12, 5]])


def feed(name: str) -> dict[str, Tensor]:
    """A batch of two rows for a model."""
    found = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS)}
    if name == "udop":
        corner = torch.arange(12).view(2, 6, 1) / 24
        found["bbox"] = torch.cat([corner, corner, corner + 0.3, corner + 0.2], -1)
    return found if name == "t5 encoder" else {**found, "decoder_input_ids": _DECODER_IDS}


def build(name: str) -> Any:
    """A fresh copy of a model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLASSES[name]()
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):  # not Marian's fixed positions
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.float().eval()


def states(name: str, model: Any) -> Tensor:
    """What a model makes of its batch, with gradients: logits, or the states of an encoder alone."""
    found = model(**feed(name))
    result: Tensor = found.last_hidden_state if name == "t5 encoder" else found.logits
    return result


@torch.no_grad()
def answers(name: str, model: Any) -> Tensor:
    """The same without gradients."""
    return states(name, model)
