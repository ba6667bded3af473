"""The config of GraLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_not_negative, check_share
from veneer.errors import ConfigError


@dataclass
class GraloraConfig(TargetedConfig, peft_type=PeftType.GRALORA):
    """GraLoRA (Jung et al. 2025, arXiv:2505.20355): a weight cut into blocks, each with a low-rank change of its own.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of all blocks of a row or column together; a multiple of ``gralora_k``.
        hybrid_r: the rank of a plain LoRA beside them; 0 is none.
        alpha: the numerator of the scale ``alpha / (r + hybrid_r)``.
        gralora_dropout: dropout on the adapter's input while training.
        gralora_k: into how many parts each side of the weight is cut.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "gralora_k")
        check_not_negative(self, "hybrid_r")
        check_share(self, "gralora_dropout")
        if self.r % self.gralora_k:
            raise ConfigError(
                f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}.",
                hint="Each block has r / gralora_k of it.",
            )
