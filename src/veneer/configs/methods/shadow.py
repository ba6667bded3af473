"""The config of SHADOW."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.errors import ConfigError

MIRROR = "mirror"

_COUNTS = (
    "r",
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
    "update_hidden_size",
)
# What a decoder that is a model of its own says itself.
_SIZES = _COUNTS[1:5]


@dataclass
class ShadowConfig(TargetedConfig, peft_type=PeftType.SHADOW):
    """SHADOW: a small trained copy of the decoder runs beside it, and its states move the blocks' inputs.

    Args, beside those of :class:`TargetedConfig` (``target_modules``: whole blocks; all of the decoder when ``None``):
        r: the rank of what is added to a block's input.
        shadow_alpha: multiplies it.
        shadow_dropout: dropout of what it is worked out from, while training.
        init_weights: whether a new adapter changes nothing at first.
        shadow_model: ``"mirror"``: the small decoder has the base's architecture, in the sizes that follow. Else the
            folder of the model that it is, or a hub id that is in the cache; it then has embeddings of its own, which
            are not trained.
        shadow_num_hidden_layers: its blocks; 1 when ``None``.
        shadow_hidden_size: its width; this and what follows is the base's own where it is left out.
        shadow_num_attention_heads: its attention heads.
        shadow_intermediate_size: the width of its feed-forward layers.
        share_embeddings: whether it reads the base's embeddings, where the widths are equal.
        update_hidden_size: the width of the two small networks that move its states on; ``r`` when ``None``.
        auxiliary_loss_weight: how much its own loss counts in training, with ``task_type`` ``"CAUSAL_LM"`` or
            ``"SEQ_CLS"``.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = MIRROR
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is too small.", hint="It is at least 1.")
        if not 0 <= self.shadow_dropout < 1:
            raise ConfigError(f"shadow_dropout={self.shadow_dropout} is no probability below 1.", hint="Use 0.2.")
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        if self.shadow_model != MIRROR and sizes:
            raise ConfigError(
                f"shadow_model={self.shadow_model!r} has sizes of its own, and the config gives {sizes[0]}.",
                hint=f"Leave out {', '.join(sizes)}.",
            )
