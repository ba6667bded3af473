"""The config of DeLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class DeloraConfig(TargetedConfig, peft_type=PeftType.DELORA):
    """DeLoRA (Bini et al. 2025, arXiv:2503.18225): a low-rank change whose size is trained apart from its direction.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        delora_lambda: the initial value of the trained norm.
        rank_pattern: ``{pattern: r}`` for modules whose name ends with the pattern (a regular expression).
        lambda_pattern: the same for ``delora_lambda``.
        module_dropout: dropout on the adapter's input while training.
        bias: ``"none"``, ``"delora_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` starts without effect, ``False`` at random.
    """

    r: int = 8
    delora_lambda: int | float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "rank_pattern")
        check_share(self, "module_dropout")
