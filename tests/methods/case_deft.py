from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "DeftConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    Case(
        "qr",
        "gpt2",
        "DeftConfig",
        {
            "r": 4,
            "alpha": 6,
            "decomposition_method": "qr",
            "target_modules": ["c_attn", "mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    Case(
        "para",
        "bert",
        "DeftConfig",
        {"r": 4, "para": True, "target_modules": ["query", "intermediate.dense"]},
        starts_still=False,
        visible=0.01,
    ),
]
