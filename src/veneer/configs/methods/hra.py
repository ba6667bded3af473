"""The config of HRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one


@dataclass
class HRAConfig(TargetedConfig, peft_type=PeftType.HRA):
    """HRA (Yuan et al. 2024, arXiv:2405.17484): a chain of reflections of each layer's input.

    Args, beside those of :class:`TargetedConfig`:
        r: how many reflections; an even number can start without effect.
        apply_GS: make the reflections' normals orthogonal to each other (Gram-Schmidt).
        bias: ``"none"``, ``"hra_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` starts in equal pairs, which cancel each other; ``False`` at random.
    """

    r: int = 8
    apply_GS: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
