"""The config of FRoD."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_share


@dataclass
class FrodConfig(TargetedConfig, peft_type=PeftType.FROD):
    """FRoD: a weight in a basis that the layers of one role share, with trained scales and a few trained entries.

    Args, beside those of :class:`TargetedConfig`:
        projection_prng_key: the seed of which entries are trained.
        save_projection: whether basis and places are saved; else they are computed again from the base.
        frod_dropout: dropout on the change's input while training.
        sparse_rate: the share of entries that is trained.
        regularization_alpha: keeps the basis well-conditioned where layers are alike.
        progressbar, runtime_offload_base_weight: kept for peft's files; they change no result.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 0.001
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "frod_dropout")
