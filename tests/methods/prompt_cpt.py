from __future__ import annotations

from tests.methods.prompt import PromptCase

_EXAMPLES = {
    "cpt_token_ids": [11, 12, 13, 14, 15, 16, 17, 18],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 6, 8],
    "opt_projection_epsilon": 9.0,
    "opt_projection_format_epsilon": 6.0,
}
_DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
CASES = [
    PromptCase("llama", "CPTConfig", _EXAMPLES),
    PromptCase("gpt2", "CPTConfig", {**_EXAMPLES, **_DECAY}, label="decay"),
]
