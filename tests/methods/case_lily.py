from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "shared",
        "llama",
        "LilyConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "stride_A": 2, "num_B": 3, "scaling": 2.0},
        merges=False,
        rows=False,
    ),
    Case("bert", "bert", "LilyConfig", {"target_modules": ["query", "value"], "r": 4}, merges=False, rows=False),
]
