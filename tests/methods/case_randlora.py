from __future__ import annotations

from tests.methods.case import Case

_COPIES = r"base_model\.model\..*\.randlora_[AB]$"
CASES = [
    Case(
        "llama",
        "llama",
        "RandLoraConfig",
        {"r": 5, "randlora_alpha": 4, "target_modules": ["k_proj", "down_proj", "up_proj"]},
        says_nothing=_COPIES,
    ),
    Case(
        "unsaved projection",
        "llama",
        "RandLoraConfig",
        {"r": 8, "randlora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "save_projection": False},
    ),
    Case(
        "very sparse",
        "bert",
        "RandLoraConfig",
        {"r": 8, "randlora_alpha": 4, "target_modules": ["query"], "very_sparse": True, "save_projection": False},
    ),
    Case(
        "gpt2",
        "gpt2",
        "RandLoraConfig",
        {"r": 8, "randlora_alpha": 4, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        says_nothing=_COPIES,
    ),
]
