"""A table of the model families that have exactly one form: each parameter's shape, by sizes that a config names.

model.embed_tokens   model.layers.N.input_layernorm             model.norm   lm_head (or the embedding's weight)
.self_attn.{q,k,v,o}_proj
.post_attention_layernorm
.mlp.{gate,up,down}_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[str, ...]]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Size -> the key of the config that names it.
SIZES: Mapping[str, str] = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "blocks": "num_hidden_layers",
}
# Of these a shape has "head", a head's width, and "queries" and "keys", the widths of all heads together.
BEFORE_BLOCKS: Shapes = {EMBEDDING: ("vocabulary", "hidden")}
AFTER_BLOCKS: Shapes = {"model.norm.weight": ("hidden",), HEAD: ("vocabulary", "hidden")}
_BLOCK: Shapes = {
    "self_attn.q_proj.weight": ("queries", "hidden"),
    "self_attn.k_proj.weight": ("keys", "hidden"),
    "self_attn.v_proj.weight": ("keys", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "queries"),
    "mlp.gate_proj.weight": ("inner", "hidden"),
    "mlp.up_proj.weight": ("inner", "hidden"),
    "mlp.down_proj.weight": ("hidden", "inner"),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_BIASES: Shapes = {
    "self_attn.q_proj.bias": ("queries",),
    "self_attn.k_proj.bias": ("keys",),
    "self_attn.v_proj.bias": ("keys",),
}
_HEAD_NORMS: Shapes = {
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
}


@dataclass(frozen=True)
class Family:
    """A family: the class of its models, and the parameters of a block."""

    model_class: str
    block: Shapes


# By the config's "model_type".
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", _BLOCK),
    "mistral": Family("MistralForCausalLM", _BLOCK),
    "qwen2": Family("Qwen2ForCausalLM", {**_BLOCK, **_BIASES}),
    "qwen3": Family("Qwen3ForCausalLM", {**_BLOCK, **_HEAD_NORMS}),
}


def plain_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each parameter of the model that a config describes, the head's too where it is tied.

    ``None`` for another family, for a config with something special, and for one without whole numbers.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not _is_plain(family, config):
        return None
    sizes = {size: config[key] for size, key in SIZES.items()}
    head = config.get("head_dim") or sizes["hidden"] // max(sizes["heads"], 1)
    sizes |= {"head": head, "queries": sizes["heads"] * head, "keys": sizes["key_heads"] * head}
    blocks = {f"model.layers.{i}.{name}": shape for i in range(sizes["blocks"]) for name, shape in family.block.items()}
    named = {**BEFORE_BLOCKS, **blocks, **AFTER_BLOCKS}
    return {name: tuple(sizes[size] for size in shape) for name, shape in named.items()}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether the head of a plain model is its embedding."""
    return bool(config.get("tie_word_embeddings", False))


def _is_plain(family: Family, config: Mapping[str, Any]) -> bool:
    """Tell whether a config describes a model of its family, with nothing special, by whole numbers."""
    return (
        config.get("architectures") == [family.model_class]
        and all(config.get(key) is None for key in ("quantization_config", "auto_map"))
        and all(isinstance(config.get(key), int) for key in SIZES.values())
        and isinstance(config.get("head_dim") or 0, int)
    )
