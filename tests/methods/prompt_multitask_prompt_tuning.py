from __future__ import annotations

from tests.methods.prompt import PromptCase

_SIZES = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
CASES = [
    PromptCase("llama", "MultitaskPromptTuningConfig", _SIZES, tasks=(2, 0)),
    PromptCase("bert", "MultitaskPromptTuningConfig", _SIZES, tasks=(1, 1)),
]
