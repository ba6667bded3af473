from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "MissConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    Case("a rank that divides nothing", "llama", "MissConfig", {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    Case("bat", "llama", "MissConfig", {"r": 4, "init_weights": "bat", "target_modules": ["q_proj", "down_proj"]}),
    Case("mini", "bert", "MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini", "target_modules": ["query"]}),
]
