from __future__ import annotations

from tests.methods.case import Case

_LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
_CONV = {"r": 3, "lora_alpha": 8, "target_modules": ["embed", "conv1", "conv2", "point", "first"]}
CASES = [
    Case("llama", "llama", "LoraConfig", {**_LLAMA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}}),
    Case("rank-stabilised", "llama", "LoraConfig", {**_LLAMA, "use_rslora": True}),
    Case("DoRA", "llama", "LoraConfig", {**_LLAMA, "use_dora": True}),
    Case("gpt2", "gpt2", "LoraConfig", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}),
    Case("bert, biases", "bert", "LoraConfig", {"r": 4, "lora_bias": True, "target_modules": ["query", "value"]}),
    Case("t5", "t5", "LoraConfig", {"r": 3, "target_modules": ["q", "wo"]}),
    Case("conv", "conv", "LoraConfig", _CONV),
    Case("conv, DoRA", "conv", "LoraConfig", {**_CONV, "use_dora": True}),
]
