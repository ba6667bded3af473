"""The config of Bone."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice


@dataclass
class BoneConfig(TargetedConfig, peft_type=PeftType.BONE):
    """Bone (Kang & Yin 2024, arXiv:2409.15371): the first form of MiSS, which peft 0.14 to 0.18 saved.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        bias: ``"none"``, ``"bone_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` (or ``False`` for a random start), or ``"bat"`` for blocks that act on the weight's own.
    """

    r: int = 64
    bias: str = "none"
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
        check_choice(self, "init_weights", True, False, "bat")
