"""The config of BOFT."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share
from veneer.errors import ConfigError


@dataclass
class BOFTConfig(TargetedConfig, peft_type=PeftType.BOFT):
    """BOFT (Liu et al. 2024, arXiv:2311.06243): a rotation of each layer's input, as a product of sparse ones.

    Args, beside those of :class:`TargetedConfig`:
        boft_block_size: the size of a block; 0 to give ``boft_block_num`` instead.
        boft_block_num: how many blocks; 0 to give ``boft_block_size``. Either has to divide the input.
        boft_n_butterfly_factor: how many sparse rotations are multiplied.
        boft_dropout: share of the blocks that is the identity while training.
        bias: ``"none"``, ``"boft_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` starts without effect, ``False`` at random.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "boft_dropout")
        check_at_least_one(self, "boft_n_butterfly_factor")
        sizes = (self.boft_block_size, self.boft_block_num)
        if min(sizes) != 0 or max(sizes) < 1:
            raise ConfigError(
                f"boft_block_size={sizes[0]} and boft_block_num={sizes[1]} do not say how a layer is cut into blocks.",
                hint="Give one of them, and 0 for the other.",
            )
