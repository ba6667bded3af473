"""The config of C3A."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice


@dataclass
class C3AConfig(TargetedConfig, peft_type=PeftType.C3A):
    """C3A (Chen et al. 2024, arXiv:2407.19342): a change made of circulant blocks.

    Args, beside those of :class:`TargetedConfig`:
        block_size: the size of a block; it divides the inputs and the outputs.
        block_size_pattern: ``{pattern: block_size}`` for modules whose name ends with the pattern.
        bias: ``"none"``, ``"c3a_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``"xavier_uniform"``, ``"kaiming_uniform"``, ``"gaussian"``, or ``True`` to start at zero.
    """

    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    bias: str = "none"
    init_weights: bool | str | None = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "block_size", "block_size_pattern")
        check_choice(self, "init_weights", True, False, None, "xavier_uniform", "kaiming_uniform", "gaussian")
