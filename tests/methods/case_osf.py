from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "OSFConfig", {"target_modules": ["q_proj", "down_proj"]}),
    Case(
        "ranks",
        "bert",
        "OSFConfig",
        {
            "effective_rank": 20,
            "rank_pattern": {"intermediate": 0.25},
            "target_modules": ["query", "intermediate.dense"],
        },
    ),
]
