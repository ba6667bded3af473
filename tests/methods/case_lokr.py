from __future__ import annotations

from tests.methods.case import Case

_BOTH = {"decompose_both": True, "decompose_factor": 8}
_FEW = {"decompose_factor": 2}
_CONV = {"target_modules": ["conv1", "conv2", "point", "first"]}
CASES = [
    Case("llama", "llama", "LoKrConfig", {"r": 2, "target_modules": ["q_proj", "down_proj"]}),
    Case("llama, few rows", "llama", "LoKrConfig", {"r": 1, "target_modules": ["up_proj", "down_proj"], **_FEW}),
    Case("both decomposed", "llama", "LoKrConfig", {"r": 1, "alpha": 9, "target_modules": ["q_proj"], **_BOTH}),
    Case(
        "bert, whole", "bert", "LoKrConfig", {"r": 16, "alpha": 20, "target_modules": ["query", "intermediate.dense"]}
    ),
    Case("conv, whole", "conv", "LoKrConfig", {"r": 8, **_CONV}),
    Case("conv, decomposed", "conv", "LoKrConfig", {"r": 1, **_CONV, "init_weights": "lycoris"}),
    Case(
        "conv, Tucker",
        "conv",
        "LoKrConfig",
        {"r": 2, "alpha": 20, "decompose_factor": 1, **_CONV, "use_effective_conv2d": True},
    ),
]
