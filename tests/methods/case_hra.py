from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "HRAConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    Case(
        "bert, orthogonal",
        "bert",
        "HRAConfig",
        {"r": 3, "apply_GS": True, "target_modules": ["query"]},
        starts_still=False,
    ),
    Case("conv", "conv", "HRAConfig", {"r": 2, "target_modules": ["conv2", "point", "first"]}),
]
