from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "PeanutConfig", {"r": 6, "target_modules": ["q_proj", "down_proj"]}),
    Case(
        "deep",
        "bert",
        "PeanutConfig",
        {"r": 6, "depth": 2, "act_fn": "gelu", "scaling": 0.5, "target_modules": ["query", "output.dense"]},
    ),
]
