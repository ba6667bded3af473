from __future__ import annotations

from tests.methods.prompt import PromptCase, everywhere

CASES = [
    *everywhere("PrefixTuningConfig", fills_cache=True),
    PromptCase(
        "gpt2",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8, "init_weights": "zero"},
        label="projected",
        fills_cache=True,
    ),
]
