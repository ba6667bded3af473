"""The config of Poly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one


@dataclass
class PolyConfig(TargetedConfig, peft_type=PeftType.POLY):
    """Poly (Ponti et al. 2022, arXiv:2202.13914): each task mixes the same few low-rank skills in its own way.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank of a skill.
        init_weights: whether a new adapter changes nothing.
        poly_type: the kind of routing; only ``"poly"`` is known.
        n_tasks: how many tasks.
        n_skills: how many skills a layer has.
        n_splits: into how many parts input and output are split, each with its own mixture (multi-head routing,
            Caccia et al. 2022, arXiv:2211.03831).
    """

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    supported_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"poly_type": ("poly",)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "n_tasks", "n_skills", "n_splits")
