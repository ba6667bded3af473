"""The config of RoAd."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_choice
from veneer.errors import ConfigError

# How many numbers of each of its two tensors a variant has for two outputs.
VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass
class RoadConfig(TargetedConfig, peft_type=PeftType.ROAD):
    """RoAd (Liao & Monz 2024, arXiv:2409.00119): rotations and scales of pairs of a layer's outputs.

    Args, beside those of :class:`TargetedConfig`:
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``: how many angles and scales a pair of outputs has.
        group_size: the outputs are cut into groups of this size, an output of a group's first half paired with one of
            its second.
        init_weights: ``True`` starts without effect, ``False`` at random.
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variant = str(getattr(self.variant, "value", self.variant))
        check_choice(self, "variant", *VARIANTS)
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(
                f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}.",
                hint=f"group_size={self.group_size}: its halves are paired.",
            )
