"""The config of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType


@dataclass
class TrainableTokensConfig(TargetedConfig, peft_type=PeftType.TRAINABLE_TOKENS):
    """Trainable tokens: single vectors of an embedding, trained while all others stay.

    Args, beside those of :class:`TargetedConfig` (``target_modules=None`` takes the model's input embedding):
        token_indices: the tokens.
        init_weights: ``True`` starts from the embedding's own vectors, ``False`` at random.
    """

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    unordered = ()
