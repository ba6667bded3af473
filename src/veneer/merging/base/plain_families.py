"""A table of the model families that have exactly one form: each parameter's shape, by sizes that a config names.

model.embed_tokens   model.layers.N.input_layernorm             model.norm   lm_head (or the embedding's weight)
.self_attn.{q,k,v,o}_proj
.post_attention_layernorm
.mlp.{gate,up,down}_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
