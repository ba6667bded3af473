"""The config of Lily."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.errors import ConfigError


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
        for name, least in (("r", 1), ("stride_A", 1), ("num_B", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small.", hint=f"It is at least {least}.")
