from __future__ import annotations

from tests.methods.case import Case

CASES = [
    Case("llama", "llama", "LNTuningConfig"),
    Case("gpt2", "gpt2", "LNTuningConfig"),
    Case("bert", "bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}, lora_targets=["query"]),
    Case(
        "any layer",
        "conv",
        "LNTuningConfig",
        {"target_modules": ["norm", "conv2", "first", "last", "embed"]},
        lora_targets=["first"],
    ),
]
