from __future__ import annotations

from tests.methods.case import Case

_LLAMA = {"r": 6, "target_modules": ["q_proj", "down_proj"]}
CASES = [
    Case("llama", "llama", "PsoftConfig", _LLAMA),
    Case(
        "series, pissa",
        "llama",
        "PsoftConfig",
        {
            **_LLAMA,
            "ab_svd_init": "pissa_init",
            "psoft_alpha": 12,
            "use_cayley_neumann": True,
            "cayley_neumann_eps": 0.5,
            "psoft_mag_a": False,
        },
    ),
    Case(
        "any matrix, lowrank",
        "bert",
        "PsoftConfig",
        {"r": 5, "target_modules": ["query"], "psoft_orth": False, "psoft_svd": "lowrank"},
    ),
]
