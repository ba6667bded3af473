"""The config of OSF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.configs import patterns
from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType


@dataclass
class OSFConfig(TargetedConfig, peft_type=PeftType.OSF):
    """OSF (Nayak et al. 2025, arXiv:2504.07097): training that leaves the first singular directions as they are.

    Args, beside those of :class:`TargetedConfig`:
        effective_rank: how many directions are kept: a number, or a share of the smaller side; half by default.
        rank_pattern: ``{regular expression: effective_rank}`` for modules whose names contain a match.
        target_svd_config: kept, and without effect, as in peft.
    """

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    unordered = ()
    pattern_form: ClassVar[patterns.Form] = patterns.PART
