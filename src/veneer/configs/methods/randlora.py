"""The config of RandLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class RandLoraConfig(TargetedConfig, peft_type=PeftType.RANDLORA):
    """RandLoRA (Albert et al. 2025, arXiv:2502.00987): a full-rank change from scaled, random low-rank bases.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of each basis.
        projection_prng_key: the seed of the bases.
        save_projection: whether they are saved; without them the adapter is small and depends on the seed.
        sparse: bases of -1, 0 and 1, two thirds of them zero.
        very_sparse: the same with all but one in ``sqrt(min(out, in))`` zero.
        randlora_dropout: dropout on the adapter's input while training.
        randlora_alpha: the numerator of the scale ``randlora_alpha / r``.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
        check_share(self, "randlora_dropout")
