from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "theta alone",
        "llama",
        "UniLoraConfig",
        {"r": 3, "theta_d_length": 50, "target_modules": ["q_proj", "down_proj"]},
        starts_still=False,
        visible=0.005,
    ),
    Case(
        "saved indices",
        "gpt2",
        "UniLoraConfig",
        {
            "theta_d_length": 50,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "save_indices": True,
            "fan_in_fan_out": True,
        },
        starts_still=False,
        visible=0.005,
    ),
]
