"""The config of SHiRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one


@dataclass
class ShiraConfig(TargetedConfig, peft_type=PeftType.SHIRA):
    """SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): a few single weights of each layer, chosen at random.

    Args, beside those of :class:`TargetedConfig`:
        r: as many weights are trained as a LoRA of this rank has.
        mask_type: how the weights are chosen; their places are in the checkpoint. ``"random"``, or ``"custom"`` with a
            function ``config.mask_fn = f``: ``f(layer, r)`` returns a mask of the weight's shape with
            ``r * (rows + columns)`` ones.
        random_seed: of the choice.
        init_weights: ``True`` starts at zero, ``False`` at random.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    # No field, since a function cannot be in a file.
    mask_fn: ClassVar[Callable[..., Any] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r")
