"""The config of Super-Tuning."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share
from veneer.errors import ConfigError


@dataclass
class SupertuningConfig(TargetedConfig, peft_type=PeftType.SUPERTUNING):
    """Super-Tuning (arXiv:2607.09287): the largest entries of a weight are trained, and a LoRA beside them if asked.

    Args, beside those of :class:`TargetedConfig`:
        sparsity: the share of entries that is not trained.
        select_top: the largest entries by magnitude; else the smallest.
        r: the rank of the LoRA; ``None`` is none.
        lora_alpha: the numerator of its scale ``lora_alpha / r``; ``2 r`` by default.
        lora_dropout: dropout on its input while training.
        save_precomputed_indices: whether the places of the entries are saved; else they are found in the base again.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
        check_share(self, "lora_dropout")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError(
                f"lora_alpha is set but r is None: lora_alpha={self.lora_alpha!r} scales a LoRA, and there is none.",
                hint="Give r, the rank of a LoRA beside the entries, or leave lora_alpha out.",
            )
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(
                f"sparsity must be a share, and is {self.sparsity!r}.", hint="It lies between 0 and 1 (excluded)."
            )
