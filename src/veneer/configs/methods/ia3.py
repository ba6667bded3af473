"""The config of (IA)3."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs import patterns
from veneer.configs.base import Names, TargetedConfig
from veneer.configs.names import PeftType
from veneer.errors import ConfigError


@dataclass
class IA3Config(TargetedConfig, peft_type=PeftType.IA3):
    """(IA)3 (Liu et al. 2022, arXiv:2205.05638): a trained scale on each input or output of a layer.

    Args, beside those of :class:`TargetedConfig`:
        feedforward_modules: the targets whose input is scaled; of all others the output is.
    """

    feedforward_modules: Names | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    unordered = (*TargetedConfig.unordered, "feedforward_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns.check("feedforward_modules", self.feedforward_modules, patterns.WHOLE)
        targets, inputs = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(inputs, set) and not inputs <= targets:
            raise ConfigError(
                f"`feedforward_modules` should be a subset of `target_modules`: {sorted(inputs - targets)} are not.",
                hint="Add them to target_modules.",
            )
