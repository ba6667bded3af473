"""The config of OFT."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share
from veneer.errors import ConfigError


@dataclass
class OFTConfig(TargetedConfig, peft_type=PeftType.OFT):
    """OFT (Qiu et al. 2023, arXiv:2306.07280): a rotation of each layer's input, in blocks.

    Args, beside those of :class:`TargetedConfig`:
        r: how many blocks; 0 to give ``oft_block_size`` instead.
        oft_block_size: the size of a block; 0 to give ``r``. Either is moved to the nearest that divides the input.
        module_dropout: share of the blocks that is the identity while training.
        coft: keep each rotation near the identity, within ``eps`` (the paper's COFT).
        eps: see ``coft``.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: approximate the rotation by a series (Qiu et al. 2025, arXiv:2506.19847).
        num_cayley_neumann_terms: of the series.
        bias: ``"none"``, ``"oft_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` starts without effect, ``False`` at random.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "module_dropout")
        check_at_least_one(self, "num_cayley_neumann_terms")
        if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) < 1:
            raise ConfigError(
                f"r={self.r} and oft_block_size={self.oft_block_size} do not say how a layer is cut into blocks.",
                hint="Give one of them, and 0 for the other.",
            )
