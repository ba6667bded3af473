"""The config of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import PromptConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_choice


@dataclass
class PrefixTuningConfig(PromptConfig, peft_type=PeftType.PREFIX_TUNING):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190): trained keys and values before every layer's own.

    Args, beside those of :class:`PromptConfig`:
        init_weights: ``"zero"`` begins with keys and values of zero; ``None`` with random ones.
        encoder_hidden_size: the width of the network; the keys' own when ``None``.
        prefix_projection: whether keys and values are made by a small trained network.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "encoder_hidden_size")
        check_choice(self, "init_weights", None, "zero")
