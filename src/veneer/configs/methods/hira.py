"""The config of HiRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice, check_share


@dataclass
class HiraConfig(TargetedConfig, peft_type=PeftType.HIRA):
    """HiRA (Huang et al. 2025, openreview:TwJrTz9cRS): the weight's entries, each scaled by those of a low-rank matrix.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        rank_pattern: ``{pattern: r}`` for modules whose name ends with the pattern (a regular expression).
        hira_dropout: dropout on the adapter's input while training.
        init_weights: ``True`` (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal of deviation 1/r, B zero) or
            ``False`` (both random).
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "rank_pattern")
        check_share(self, "hira_dropout")
        check_choice(self, "init_weights", True, False, None, "gaussian")
