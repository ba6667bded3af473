from __future__ import annotations

from tests.methods.case import Case
from tests.models import tokens

_SEEN = sorted(set(tokens()["input_ids"].flatten().tolist()), reverse=True)
CASES = [
    Case(
        "llama",
        "llama",
        "TrainableTokensConfig",
        {"token_indices": [98, *_SEEN[::2]], "target_modules": ["embed_tokens"]},
    ),
    Case("gpt2, tied", "gpt2", "TrainableTokensConfig", {"token_indices": _SEEN[:5], "target_modules": ["wte"]}),
]
