"""The config of GLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one


@dataclass
class GloraConfig(TargetedConfig, peft_type=PeftType.GLORA):
    """GLoRA (Chavan et al. 2023, arXiv:2306.07967): scale and shift of a layer's weight and bias.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of the parts that are ``"lora"``.
        bias: ``"none"``, ``"glora_only"`` or ``"all"``: the biases that are trained too.
        config_A_B: the form of the weight's scale A and shift B: ``"lora"``, ``"vector"`` (a number a row),
            ``"constant"`` (one number) or ``"none"``.
        config_C: the form of the weight's share in the bias: ``"lora"``, ``"vector"`` or ``"none"``.
        config_D_E: the form of the bias's scale D and shift E: ``"vector"``, ``"constant"`` or ``"none"``.
    """

    r: int = 8
    bias: str = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
