"""The config of VeRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class VeraConfig(TargetedConfig, peft_type=PeftType.VERA):
    """VeRA (Kopiczko et al. 2023, arXiv:2310.11454): one random pair of matrices for all layers, and two vectors each.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of the shared matrices.
        projection_prng_key: the seed of these matrices.
        save_projection: whether they are saved; without them the adapter is smaller and depends on the seed.
        vera_dropout: dropout on the adapter's input while training.
        d_initial: the initial value of the vector on the rank; the other vector starts at zero.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
        check_share(self, "vera_dropout")
