from __future__ import annotations

from tests.methods.case import Case

_PATTERN = {"block_size_pattern": {"down_proj": 16}}
CASES = [
    Case(
        "llama",
        "llama",
        "C3AConfig",
        {"block_size": 8, **_PATTERN, "init_weights": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    Case("bert", "bert", "C3AConfig", {"block_size": 4, "target_modules": ["value"]}, starts_still=False),
]
