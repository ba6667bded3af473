from __future__ import annotations

from tests.methods.case import Case

_LLAMA = {"target_modules": ["q_proj", "down_proj"]}
CASES = [
    Case("llama", "llama", "WaveFTConfig", {"n_frequency": 60, "n_frequency_pattern": {"down_proj": 30}, **_LLAMA}),
    Case("no transform", "bert", "WaveFTConfig", {"n_frequency": 60, "use_idwt": False, "target_modules": ["query"]}),
    Case(
        "in proportion",
        "llama",
        "WaveFTConfig",
        {"n_frequency": 60, "proportional_parameters": True, "wavelet_family": "sym4", **_LLAMA},
    ),
    Case(
        "gpt2",
        "gpt2",
        "WaveFTConfig",
        {"n_frequency": 70, "wavelet_family": "coif1", "fan_in_fan_out": True, "target_modules": ["c_fc"]},
    ),
    Case("db3", "conv", "WaveFTConfig", {"n_frequency": 40, "wavelet_family": "db3", "target_modules": ["first"]}),
]
