"""The config of WaveFT."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one
from veneer.errors import ConfigError

# PyWavelets' discrete ones.
_FAMILIES = r"haar|dmey|(db|sym|coif)\d{1,2}|(bior|rbio)\d\.\d"


@dataclass
class WaveFTConfig(TargetedConfig, peft_type=PeftType.WAVEFT):
    """WaveFT (Bilican et al. 2025, arXiv:2505.12532): a few coefficients of the change's wavelet transform.

    Args, beside those of :class:`TargetedConfig`:
        n_frequency: how many coefficients a layer has.
        n_frequency_pattern: ``{pattern: n_frequency}`` for modules whose name ends with the pattern.
        proportional_parameters: give each layer coefficients in proportion to its size, ``n_frequency`` in the mean.
        scaling: multiplies the change.
        wavelet_family: such as ``"db1"``; every other one needs the package PyWavelets.
        use_idwt: ``False`` takes the coefficients for the change itself.
        random_loc_seed: the seed of the coefficients' places, which are not in the checkpoint: it needs this seed.
        bias: ``"none"``, ``"waveft_only"`` or ``"all"``: the biases that are trained too.
        init_weights: ``True`` starts at zero, ``False`` at random.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n_frequency", "n_frequency_pattern")
        if not re.fullmatch(_FAMILIES, self.wavelet_family):
            raise ConfigError(
                f"Wavelet family {self.wavelet_family} not supported.",
                hint="Supported wavelet families are: those of PyWavelets, such as db1 to db38, sym2 to sym20, coif1 "
                "to coif17, bior2.2, rbio2.2, dmey, haar.",
            )
