from __future__ import annotations

from tests.methods.case import Case

_BANK = {"num_vectors": 20, "vector_length": 8, "topk": 3}
CASES = [
    # It has no start without effect: the bank and the choice are both drawn.
    Case("llama", "llama", "VBLoRAConfig", {**_BANK, "target_modules": ["q_proj", "down_proj"]}, starts_still=False),
    Case(
        "topk alone",
        "gpt2",
        "VBLoRAConfig",
        {
            **_BANK,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "fan_in_fan_out": True,
            "save_only_topk_weights": True,
        },
        starts_still=False,
    ),
]
