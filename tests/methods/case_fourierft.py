from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "llama",
        "llama",
        "FourierFTConfig",
        {"n_frequency": 50, "n_frequency_pattern": {"down_proj": 20}, "target_modules": ["q_proj", "down_proj"]},
        starts_still=False,
    ),
    Case(
        "gpt2",
        "gpt2",
        "FourierFTConfig",
        {"n_frequency": 70, "init_weights": True, "fan_in_fan_out": True, "target_modules": ["c_fc"], "scaling": 600.0},
    ),
]
