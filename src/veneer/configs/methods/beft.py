"""The config of BEFT."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType


@dataclass
class BeftConfig(TargetedConfig, peft_type=PeftType.BEFT):
    """BEFT (Huang et al. 2025, arXiv:2509.15974): a trained vector that is added to a layer's output.

    Args, beside those of :class:`TargetedConfig`:
        init_weights: ``True`` starts at zero, ``False`` at random.
    """

    init_weights: bool = True
