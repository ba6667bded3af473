"""The config of FourierFT."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one


@dataclass
class FourierFTConfig(TargetedConfig, peft_type=PeftType.FOURIERFT):
    """FourierFT (Gao et al. 2024, arXiv:2405.03003): a few coefficients of the change's Fourier transform.

    Args, beside those of :class:`TargetedConfig`:
        n_frequency: how many coefficients a layer has.
        n_frequency_pattern: ``{pattern: n_frequency}`` for modules whose name ends with the pattern.
        scaling: multiplies the change.
        random_loc_seed: the seed of the coefficients' places, which are not in the checkpoint: it needs this seed.
        bias: ``"none"``, ``"fourier_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` starts at zero, ``False`` at random.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n_frequency", "n_frequency_pattern")
