from __future__ import annotations

from tests.methods.prompt import PromptCase

CASES = [
    PromptCase("llama", "CartridgeConfig", {"num_virtual_tokens": 4, "num_frozen_tokens": 2}, fills_cache=True),
    PromptCase("gpt2", "CartridgeConfig", {"num_virtual_tokens": 4, "num_frozen_tokens": 0}, fills_cache=True),
]
