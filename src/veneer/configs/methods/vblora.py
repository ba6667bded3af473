"""The config of VB-LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import TargetedConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one, check_not_negative, check_share
from veneer.errors import ConfigError


@dataclass
class VBLoRAConfig(TargetedConfig, peft_type=PeftType.VBLORA):
    """VB-LoRA (Li et al. 2024, arXiv:2405.15179): low-rank matrices pieced together from one bank of vectors.

    Args, beside those of :class:`TargetedConfig`:
        r: the rank.
        num_vectors: how many vectors the bank has.
        vector_length: their length; it divides in and out of every adapted layer.
        topk: how many vectors are mixed for a piece.
        save_only_topk_weights: save the indices and weights of the mixed vectors, not a logit for every vector.
        vblora_dropout: dropout on the adapter's input while training.
        init_vector_bank_bound: the bank starts uniform within this bound.
        init_logits_std: the standard deviation of the initial logits.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "r", "num_vectors", "vector_length", "topk")
        check_not_negative(self, "init_vector_bank_bound", "init_logits_std")
        check_share(self, "vblora_dropout")
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"topk={self.topk} vectors cannot be chosen of num_vectors={self.num_vectors}.",
                hint="Lower topk, or give the bank more vectors.",
            )
