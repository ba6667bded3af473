"""Knows the layers that a config without ``target_modules`` means, by the base's model type and by method.

They are peft's own choices, so that the same config adapts the same layers; of model types that peft has no choice for
some are added.
"""

from __future__ import annotations

from collections.abc import Mapping

from veneer.configs.base import Names
from veneer.configs.names import PeftType

_Names = tuple[str, ...] | str
_Table = Mapping[str, _Names]

_QV = ("q_proj", "v_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL = (*_ATTENTION, "gate_proj", "down_proj", "up_proj")
_OPT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_GEMMAS = ("gemma", "gemma2", "gemma3_text")

# LoRA's, and of every method that has none of its own: mostly the attention projections that the LoRA paper
# (section 4.2) adapts.
DEFAULTS: _Table = {
    **dict.fromkeys(("bart", *_GEMMAS, "gpt_neo", "gptj", "llama", "llama4", "llama4_text", "mistral", "mixtral"), _QV),
    **dict.fromkeys(("opt", "qwen2", "qwen3", "stablelm", "vit", "whisper"), _QV),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("bloom", "chatglm", "falcon", "gpt_neox", "RefinedWeb", "RefinedWebModel"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    "blip-2": ("q", "v", *_QV),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": _ATTENTION,
    "phi": (*_QV, "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

_T5 = {"t5": ("q", "k", "v", "o", "wi", "wo"), "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")}
_MORE_LAYERS: _Table = {
    **_T5,
    "bart": _OPT,
    "opt": _OPT,
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}
_MLP: _Table = dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",))
_PHI: _Table = {"phi": _QV}
_V = ("bart", *_GEMMAS, "gpt_neo", "gptj", "llama", "llama4", "mistral", "mixtral", "opt", "phi", "qwen2", "qwen3")
_FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")

# peft_type -> its choices where they differ from LoRA's.
_OWN: Mapping[str, _Table] = {
    PeftType.ADALORA: {**_MORE_LAYERS, "roberta": ("query", "key", "value", "dense")},
    PeftType.VBLORA: _MORE_LAYERS,
    PeftType.BEFT: {
        **dict.fromkeys(_V, ("v_proj",)),
        **dict.fromkeys(("bert", "roberta"), ("value",)),
        **dict.fromkeys(("t5", "mt5"), ("v",)),
        "deberta-v2": ("value_proj",),
    },
    **dict.fromkeys((PeftType.C3A, PeftType.FOURIERFT, PeftType.WAVEFT), _MLP),
    **dict.fromkeys((PeftType.FROD, PeftType.SHIRA, PeftType.VERA), _PHI),
    PeftType.PVERA: {**_PHI, "dinov2": ("query", "value")},
    PeftType.IA3: {
        **dict.fromkeys(_FALCON, ("query_key_value", "dense_4h_to_h")),
        **dict.fromkeys((*_GEMMAS, "llama4", "qwen2", "qwen3"), (*_QV, "down_proj")),
        **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "mlp.c_proj")),
        **dict.fromkeys(("bart", "phi"), (*_QV, "fc2")),
        "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
        "deberta": ("in_proj", "output.dense"),
        "deberta-v2": ("key_proj", "value_proj", "output.dense"),
        "gpt_neo": (*_QV, "c_proj"),
        "gpt_neox": ("query_key_value", "dense_4h_to_h"),
        "gptj": (*_QV, "fc_out"),
        "mixtral": ("k_proj", "v_proj", "w2"),
        "mt5": ("k", "v", "wi_1"),
        "opt": ("q_proj", "k_proj", "fc2"),
        "t5": ("k", "v", "wo"),
    },
    PeftType.LN_TUNING: {
        **dict.fromkeys(("llama", "mistral", "gemma"), ("input_layernorm", "post_attention_layernorm", "norm")),
        **dict.fromkeys(
            ("gemma2", "gemma3_text"),
            (
                *("input_layernorm", "post_attention_layernorm", "norm"),
                *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            ),
        ),
        **dict.fromkeys(("bloom", "falcon"), ("input_layernorm", "post_attention_layernorm", "ln_f")),
        **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
        **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
        "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        "gptj": ("ln_1", "ln_f"),
        "phi": ("input_layernorm", "final_layernorm"),
    },
    PeftType.OSF: {
        **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", *_GEMMAS, "phi", "qwen2", "qwen3"), _ALL),
        **dict.fromkeys(("bloom", "falcon", "gpt_neox"), ("query_key_value", "dense_4h_to_h")),
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
        "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        "opt": _OPT,
    },
}

# The feed-forward layers of (IA)3, whose input is scaled.
_FEEDFORWARD: _Table = {
    **dict.fromkeys((*_FALCON, "gpt_neox"), ("dense_4h_to_h",)),
    **dict.fromkeys((*_GEMMAS, "llama", "llama4", "mistral", "qwen2", "qwen3"), ("down_proj",)),
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "roberta"), ("output.dense",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    **dict.fromkeys(("bart", "opt", "phi"), ("fc2",)),
    "bloom": ("mlp.dense_4h_to_h",),
    "gpt_neo": ("c_proj",),
    "gptj": ("fc_out",),
    "mixtral": ("w2",),
    "t5": ("wo",),
}


# (peft_type, model type) -> the choice that a program has registered.
REGISTERED: dict[tuple[str, str], Names] = {}


def own_targets(peft_type: str, model_type: str | None) -> Names | None:
    """Return the usual choice of a method for a model type, where it differs from that of LoRA."""
    registered = REGISTERED.get((str(peft_type), model_type or ""))
    return registered or _as_option(_OWN.get(peft_type, {}).get(model_type or ""))


def default_targets(peft_type: str, model_type: str | None) -> Names | None:
    """Return the usual choice of a method for a model type."""
    usual = own_targets(peft_type, model_type) or _as_option(DEFAULTS.get(model_type or ""))
    # OSF trains whole layers: those that it is not told are all that it can.
    return "all-linear" if usual is None and peft_type == PeftType.OSF else usual


def model_types(peft_type: str) -> list[str]:
    """Return the model types for which a method has a usual choice."""
    return list(dict.fromkeys([*DEFAULTS, *_OWN.get(peft_type, ())]))


def default_feedforward(model_type: str | None) -> Names | None:
    """Return the names of the feed-forward layers whose input (IA)3 scales in models of a type."""
    return _as_option(_FEEDFORWARD.get(model_type or ""))


def _as_option(names: _Names | None) -> Names | None:
    return set(names) if isinstance(names, tuple) else names
