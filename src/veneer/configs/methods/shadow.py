"""The config of SHADOW."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share
from veneer.errors import ConfigError

MIRROR = "mirror"

# Sizes of the small decoder, unless it is a model of its own.
_SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
)


@dataclass
class ShadowConfig(TargetedConfig, peft_type=PeftType.SHADOW):
    """SHADOW: a small trained copy of the decoder runs beside it, and its states move the blocks' inputs.

    ``target_modules`` are whole blocks; when ``None`` all of the decoder, and of a diffusion transformer the
    single-stream ones if it has such.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of the change of a block's input.
        shadow_alpha: multiplies the change.
        shadow_dropout: dropout on the input of the change while training.
        init_weights: whether a new adapter changes nothing at first.
        shadow_model: ``"mirror"``: the small decoder has the base's architecture, in the sizes below. Else the folder
            of a model, or a hub id that is in the cache; that decoder has embeddings of its own, which are not trained.
        shadow_num_hidden_layers: its blocks; 1 when ``None``.
        shadow_hidden_size: its width; this size and those below are the base's own when ``None``.
        shadow_num_attention_heads: its attention heads.
        shadow_intermediate_size: the width of its feed-forward layers.
        share_embeddings: whether it reads the base's embeddings, where the widths are equal.
        update_hidden_size: the width of the two small networks that update its states; ``r`` when ``None``.
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
        check_at_least_one(self, "r", "update_hidden_size", *_SIZES)
        check_share(self, "shadow_dropout")
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        if self.shadow_model != MIRROR and sizes:
            raise ConfigError(
                f"shadow_model={self.shadow_model!r} has sizes of its own, and the config gives {sizes[0]}; sizes are "
                "mirror-only overrides.",
                hint=f"Leave out {', '.join(sizes)}.",
            )
