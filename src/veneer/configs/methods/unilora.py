"""The config of Uni-LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_not_negative, check_share


@dataclass
class UniLoraConfig(TargetedConfig, peft_type=PeftType.UNILORA):
    """Uni-LoRA (Li et al. 2025, arXiv:2506.00799): every entry of every low-rank matrix is one of a few numbers.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        proj_seed: the seed of the assignment of numbers to entries.
        theta_d_length: how many numbers are trained.
        unilora_dropout: dropout on the adapter's input while training.
        init_theta_d_bound: the numbers start uniform within this bound.
        save_indices: whether the assignment is saved; else it is made from the seed.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "theta_d_length")
        check_not_negative(self, "proj_seed", "init_theta_d_bound")
        check_share(self, "unilora_dropout")
