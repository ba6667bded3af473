"""AdaMSS needs scikit-learn, in peft as here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tests.methods.case import Case


def _case(label: str, network: str, targets: list[str], **more: Any) -> Case:
    sizes = {"r": 10, "num_subspaces": 3, "subspace_rank": 2}
    return Case(label, network, "AdamssConfig", {**sizes, "target_modules": targets, **more})


# Layers whose rows stay in their groups when the base is rounded to bfloat16; it is refused where one changes over.
_CASES = [
    _case("llama", "llama", ["q_proj", "down_proj"]),
    _case("bert", "bert", ["query", "intermediate.dense"], random_seed=4, use_asa=True),
    _case("dynamic rank", "llama", ["q_proj", "down_proj"], use_dynamic_rank=True, svd_threshold=0.6),
]
CASES = _CASES if find_spec("sklearn") else []
