from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "SupertuningConfig", {"sparsity": 0.9, "target_modules": ["q_proj", "down_proj"]}),
    Case(
        "supra",
        "bert",
        "SupertuningConfig",
        {"sparsity": 0.9, "select_top": False, "r": 4, "target_modules": ["query"]},
    ),
]
