"""The config of DEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_share


@dataclass
class DeftConfig(TargetedConfig, peft_type=PeftType.DEFT):
    """DEFT (NeurIPS 2025): a subspace is taken out of a weight and filled anew.

    Args, beside those of :class:`TargetedConfig`:
        r: the dimension of the subspace.
        decomposition_method: the projection: ``"relu"``, ``P relu(P)^T``, or ``"qr"``, orthogonally.
        init_scale: multiplies the deviation that ``R`` starts with where ``init_weights`` is off.
        alpha: ``alpha / r`` multiplies the injected change; ``None`` is 1.
        para: PaRa (Chen et al. 2024, arXiv:2406.05641): take out and fill in nothing.
        deft_dropout: dropout on the adapter's input while training.
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
        check_share(self, "deft_dropout")
