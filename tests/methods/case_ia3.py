from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "llama", "llama", "IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ),
    Case(
        "gpt2",
        "gpt2",
        "IA3Config",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    Case("t5", "t5", "IA3Config", {"target_modules": ["k", "wo"], "feedforward_modules": ["wo"]}),
    Case(
        "conv", "conv", "IA3Config", {"target_modules": ["conv2", "point", "first"], "feedforward_modules": ["conv2"]}
    ),
]
