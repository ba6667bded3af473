from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "llama",
        "llama",
        "DeloraConfig",
        {"r": 4, "lambda_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "down_proj"]},
    ),
    Case("bert", "bert", "DeloraConfig", {"r": 3, "bias": "all", "target_modules": ["query"]}),
]
