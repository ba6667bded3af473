"""The config of LN tuning."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType


@dataclass
class LNTuningConfig(TargetedConfig, peft_type=PeftType.LN_TUNING):
    """LN tuning (Zhao et al. 2024, arXiv:2312.11420): the norms' own weights and biases, trained and saved whole.

    Args, beside those of :class:`TargetedConfig` (``target_modules=None`` takes every norm of the model): none.
    """

    unordered = ()
