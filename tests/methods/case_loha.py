from __future__ import annotations

from tests.methods.case import Case

_PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}}
_CONV = {"r": 3, "target_modules": ["conv1", "conv2", "point", "first"]}
CASES = [
    Case("llama", "llama", "LoHaConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"], **_PATTERNS}),
    Case("llama, small", "llama", "LoHaConfig", {"r": 2, "target_modules": ["q_proj", "down_proj"]}),
    Case("t5", "t5", "LoHaConfig", {"r": 3, "alpha": 7, "target_modules": ["q", "wo"]}),
    Case("conv", "conv", "LoHaConfig", _CONV),
    Case("conv, Tucker", "conv", "LoHaConfig", {**_CONV, "alpha": 40, "use_effective_conv2d": True}),
]
