from __future__ import annotations

from tests.methods.case import Case

_R = {"r": 6, "generator_seed": 1}
CASES = [
    Case("llama", "llama", "PveraConfig", {**_R, "target_modules": ["q_proj", "down_proj"]}),
    Case(
        "unsaved projection",
        "llama",
        "PveraConfig",
        {**_R, "target_modules": ["q_proj"], "save_projection": False, "projection_prng_key": 7},
    ),
    Case("gpt2", "gpt2", "PveraConfig", {**_R, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
]
