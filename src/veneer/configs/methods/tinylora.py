"""The config of TinyLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class TinyLoraConfig(TargetedConfig, peft_type=PeftType.TINYLORA):
    """TinyLoRA (arXiv:2602.04118): a change within the base's own first singular vectors, given by a few numbers.

    Args, beside those of :class:`TargetedConfig`:
        r: how many singular vectors.
        u: how many numbers are trained for a group of layers.
        weight_tying: the share of layers that join a group: 0 is a group a layer, 1 is one group for all.
        projection_seed: the seed of the random matrices that the numbers weigh.
        save_projection: whether these matrices are saved; without them the adapter is smaller and depends on the seed.
        init_v_bound: with ``init_weights="uniform"`` the numbers start uniform within this bound, else at zero.
        tinylora_dropout: dropout on the adapter's input while training.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "u")
        check_share(self, "tinylora_dropout")
