"""The config of BEFT."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.config import PeftType, TargetedConfig


@dataclass
class BeftConfig(TargetedConfig):
    """BEFT (Huang et al. 2025, arXiv:2509.15974): a trained vector that is added to a layer's output.

    Args, beside those of :class:`TargetedConfig`:
        init_weights: ``True`` starts at zero, ``False`` at random.
    """

    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BEFT


CONFIG = BeftConfig
