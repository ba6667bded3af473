from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("bert", "bert", "BeftConfig", {"target_modules": ["query", "value"]}),
    # peft refuses to merge into a layer without a bias.
    Case("llama", "llama", "BeftConfig", {"target_modules": ["v_proj", "down_proj"]}, peer_merges=False),
]
