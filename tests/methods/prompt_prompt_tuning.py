from __future__ import annotations

from tests.methods.prompt import PromptCase, everywhere

CASES = [
    *everywhere("PromptTuningConfig"),
    PromptCase(
        "llama",
        "PromptTuningConfig",
        {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"},
        label="from words",
    ),
]
