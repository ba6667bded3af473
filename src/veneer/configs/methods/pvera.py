"""The config of PVeRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class PveraConfig(TargetedConfig, peft_type=PeftType.PVERA):
    """PVeRA (arXiv:2512.07703): VeRA whose hidden vector is a distribution, of which inference takes the mean.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of the shared matrices.
        projection_prng_key: the seed of these matrices.
        save_projection: whether they are saved; without them the adapter is smaller and depends on the seed.
        pvera_dropout: dropout on the adapter's input while training.
        d_initial: the initial value of the vector on the rank; the other vector starts at zero.
        sample_at_inference: whether inference draws from the distribution too; such an adapter cannot be merged.
        generator_seed: the seed of the draws, of which each layer has a sequence of its own; torch's own when ``None``.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
        check_share(self, "pvera_dropout")
