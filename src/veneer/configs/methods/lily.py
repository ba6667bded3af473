"""The config of Lily."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least


@dataclass
class LilyConfig(TargetedConfig, peft_type=PeftType.LILY):
    """Lily (Zhong et al. 2024, arXiv:2407.09946): layers share their factors, and a router mixes the second ones.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        stride_A: how many layers on end, of one target, share a first factor.
        num_B: how many second factors the layers of one target share.
        scaling: multiplies the change.
        init_weights: whether a new adapter changes nothing.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "r", "stride_A")
        check_at_least(self, 2, "num_B")
