from __future__ import annotations

from tests.methods.prompt import PromptCase

_SIZES = {"num_virtual_tokens": 4, "encoder_hidden_size": 16}
CASES = [
    PromptCase("llama", "PromptEncoderConfig", _SIZES),
    PromptCase("t5", "PromptEncoderConfig", {**_SIZES, "encoder_reparameterization_type": "LSTM"}, label="LSTM"),
]
