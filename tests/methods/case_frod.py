from __future__ import annotations

from tests.methods.case import Case

_QUIET = {"progressbar": False, "sparse_rate": 0.05}
CASES = [
    Case("llama", "llama", "FrodConfig", {**_QUIET, "target_modules": ["q_proj", "down_proj"]}, close=1e-4),
    Case(
        "unsaved projection",
        "bert",
        "FrodConfig",
        {**_QUIET, "target_modules": ["query", "output.dense"], "save_projection": False},
        close=1e-4,
        # The basis hangs on every bit of the weights, so these are such as bfloat16 can hold.
        prepare=lambda model: model.bfloat16().float(),
    ),
]
