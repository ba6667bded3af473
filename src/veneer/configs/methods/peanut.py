"""The config of PEANuT."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one


@dataclass
class PeanutConfig(TargetedConfig, peft_type=PeftType.PEANUT):
    """PEANuT (Zhong et al. 2024, arXiv:2410.01870): a change that a small network computes from the weight itself.

    Args, beside those of :class:`TargetedConfig`:
        r: the network's width.
        depth: how many layers lie before its middle, and as many after it.
        act_fn: the activation, by its name in transformers.
        scaling: multiplies the change.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
