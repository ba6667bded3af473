from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "HiraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    Case("gpt2", "gpt2", "HiraConfig", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}),
    Case("bert", "bert", "HiraConfig", {"r": 4, "target_modules": ["query", "intermediate.dense"]}),
    Case("conv", "conv", "HiraConfig", {"r": 4, "target_modules": ["embed", "conv1", "conv2", "point", "first"]}),
]
