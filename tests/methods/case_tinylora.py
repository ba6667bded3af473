from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "TinyLoraConfig", {"r": 4, "u": 8, "target_modules": ["q_proj", "down_proj"]}),
    Case(
        "tied, unsaved projection",
        "gpt2",
        "TinyLoraConfig",
        {
            "u": 8,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "weight_tying": 0.4,
            "save_projection": False,
            "fan_in_fan_out": True,
        },
    ),
    Case("embedding", "conv", "TinyLoraConfig", {"u": 8, "target_modules": ["embed", "last"]}),
]
