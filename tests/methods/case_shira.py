from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "ShiraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    Case("seeded", "bert", "ShiraConfig", {"r": 6, "random_seed": 5, "target_modules": ["query", "value"]}),
]
