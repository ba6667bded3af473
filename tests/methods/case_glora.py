from __future__ import annotations

from tests.methods.case import Case

_ZEROS = r"\.zeros$"
CASES = [
    Case(
        "bert",
        "bert",
        "GloraConfig",
        {"r": 4, "config_D_E": "vector", "target_modules": ["query", "intermediate.dense"]},
        says_nothing=_ZEROS,
    ),
    Case(
        "vectors",
        "bert",
        "GloraConfig",
        {"config_A_B": "vector", "config_C": "vector", "target_modules": ["query", "intermediate.dense"]},
        says_nothing=_ZEROS,
    ),
    Case(
        "constants, no bias",
        "llama",
        "GloraConfig",
        {"config_A_B": "constant", "target_modules": ["q_proj", "down_proj"]},
        says_nothing=_ZEROS,
    ),
]
