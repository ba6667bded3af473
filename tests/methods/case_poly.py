from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case(
        "multi-head",
        "llama with tasks",
        "PolyConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 4,
            "n_tasks": 3,
            "n_skills": 2,
            "n_splits": 2,
            "task_type": "CAUSAL_LM",
        },
        merges=False,
    ),
]
