"""The config of LoHa."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class LoHaConfig(TargetedConfig, peft_type=PeftType.LOHA):
    """LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): the entrywise product of two low-rank matrices.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of each of the two; their product can have the rank ``r * r``.
        alpha: the numerator of the scale ``alpha / r``.
        rank_pattern: ``{pattern: r}`` for modules whose name ends with the pattern (a regular expression).
        alpha_pattern: the same for ``alpha``.
        rank_dropout: share of the rows of the change that is dropped while training.
        module_dropout: share of the steps in which a layer's whole change is dropped while training.
        use_effective_conv2d: decompose the kernels of convolutions further (Tucker).
        init_weights: ``True`` starts without effect, ``False`` at random.
    """

    tensor_head = "hada"

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "rank_pattern")
        check_share(self, "rank_dropout", "module_dropout")
