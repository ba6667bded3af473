"""The config of LoKr."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.methods.loha import LoHaConfig
from veneer.configs.names import PeftType


@dataclass
class LoKrConfig(LoHaConfig, peft_type=PeftType.LOKR):
    """LoKr (Yeh et al. 2024, arXiv:2309.14859, section 3): a Kronecker product of two small matrices.

    Args, beside those of :class:`LoHaConfig` (``r`` is the rank of a factor that is itself decomposed):
        decompose_both: decompose the first factor too, where that makes it smaller.
        decompose_factor: about which size the first factor is to have; -1 for near the square root.
        rank_dropout_scale: divide the rows that ``rank_dropout`` keeps by their share.
        init_weights: also ``"lycoris"``, which starts the second factor at zero instead of the first.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
