from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "llama",
        "llama",
        "GraloraConfig",
        {"r": 8, "alpha": 8, "gralora_k": 4, "target_modules": ["q_proj", "down_proj"]},
    ),
    Case(
        "hybrid",
        "gpt2",
        "GraloraConfig",
        {"r": 6, "hybrid_r": 3, "alpha": 8, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
]
