"""Eight tiny models with random weights, built from their configs: no network, the same on every run.

build("gpt2")        a fresh copy: float32, in eval mode
inputs("gpt2")       a batch of two for it
CASES["gpt2"]        what an adapter can target in it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCAB = 99
TEXT: Mapping[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCKS: Mapping[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: Mapping[str, Any] = {
    **TEXT,
    **BLOCKS,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        make: builds the model, its weights random.
        feed: builds a batch of two rows.
        task: the task type that peft would record for it.
        targets: dotted endings of layers that are commonly adapted.
        blocks: the name of the list of blocks, for ``layers_pattern``.
        options: what LoraConfig needs for every adapter of this architecture.
        head: an output layer that shares its weight with no other, for ``modules_to_save``.
    """

    make: Callable[[], torch.nn.Module]
    feed: Callable[[], dict[str, Tensor]]
    task: str | None
    targets: tuple[str, ...]
    blocks: str
    options: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None


def tokens(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Token ids without padding, shape ``(rows, length)``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _noise(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(2))}


def _decoder(**source: Any) -> dict[str, Tensor]:
    return {**source, "decoder_input_ids": tokens(length=5)["input_ids"]}


def _llama() -> torch.nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))


def _wide_llama() -> torch.nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "hidden_size": 64, "intermediate_size": 64}))


def _qwen2() -> torch.nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA))


# Where a family drops out by default it is turned off: training mode then computes the same every time.


def _gpt2() -> torch.nn.Module:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**TEXT, **quiet, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _opt() -> torch.nn.Module:
    sizes = {**BLOCKS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return tf.OPTForCausalLM(tf.OPTConfig(**TEXT, **sizes, dropout=0.0))


def _bert() -> torch.nn.Module:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tf.BertConfig(vocab_size=VOCAB, **BLOCKS, **quiet, intermediate_size=48, num_labels=3)
    return tf.BertForSequenceClassification(config)


def _t5() -> torch.nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(vocab_size=VOCAB, **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config)


def _vit() -> torch.nn.Module:
    config = tf.ViTConfig(**BLOCKS, intermediate_size=48, image_size=16, patch_size=4, num_labels=3)
    return tf.ViTForImageClassification(config)


def _whisper() -> torch.nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    ends = {"max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**TEXT, **layers, **sizes, **ends))


QV = ("q_proj", "v_proj")
CASES: Mapping[str, Case] = {
    "llama": Case(_llama, tokens, "CAUSAL_LM", (*QV, "down_proj"), "layers", head="lm_head"),
    "qwen2": Case(_qwen2, tokens, "CAUSAL_LM", (*QV, "down_proj"), "layers", head="lm_head"),
    "gpt2": Case(_gpt2, tokens, "CAUSAL_LM", ("c_attn", "c_fc"), "h", {"fan_in_fan_out": True}),
    "opt": Case(_opt, tokens, "CAUSAL_LM", (*QV, "fc1"), "layers"),
    "bert": Case(_bert, tokens, "SEQ_CLS", ("query", "value", "intermediate.dense"), "layer"),
    "t5": Case(_t5, lambda: _decoder(**tokens()), "SEQ_2_SEQ_LM", ("q", "v", "wi"), "block"),
    "vit": Case(_vit, lambda: _noise("pixel_values", 2, 3, 16, 16), None, (*QV, "fc1"), "layers", head="classifier"),
    "whisper": Case(_whisper, lambda: _decoder(**_noise("input_features", 2, 8, 40)), None, (*QV, "fc1"), "layers"),
}
# For quantised layers: its rows are whole blocks of 64 values. Of others, bitsandbytes (0.50) makes wrong values on
# processors with AVX-512.
WIDE_LLAMA = "llama, wide"
BUILT: Mapping[str, Case] = {**CASES, WIDE_LLAMA: replace(CASES["llama"], make=_wide_llama)}


def build(name: str) -> torch.nn.Module:
    """A fresh copy of a model: float32, in eval mode, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILT[name].make()
        # Families start their biases and norms at constants, and their weights too small for a change to show.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model.float().eval()


def inputs(name: str) -> dict[str, Tensor]:
    """A batch of two rows for a model."""
    return BUILT[name].feed()


@torch.no_grad()
def logits(model: torch.nn.Module, batch: Mapping[str, Tensor], **choice: Any) -> Tensor:
    """The model's logits for a batch."""
    result: Tensor = model(**batch, **choice).logits
    return result


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference between ``a`` and ``b``, relative to the largest value of ``b``."""
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
