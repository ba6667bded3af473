"""The config of MiSS."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice, check_share


@dataclass
class MissConfig(TargetedConfig, peft_type=PeftType.MISS):
    """MiSS (Kang & Yin 2024, arXiv:2409.15371): one small matrix, repeated along a layer's inputs.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        miss_dropout: dropout on the adapter's input while training.
        mini_r: with ``init_weights="mini"``, how many columns the matrix has; it is repeated along the outputs too.
        bias: ``"none"``, ``"miss_only"`` or ``"all"``: the biases that are trained too.
        init_weights: also names the form: ``True`` (or ``False`` for a random start) as above, ``"bat"`` for blocks
            that act on the weight's own, or ``"mini"``.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    bias: str = "none"
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "mini_r")
        check_share(self, "miss_dropout")
        check_choice(self, "init_weights", True, False, "bat", "mini")
