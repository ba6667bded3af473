"""The config of context-aware prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.base import PromptConfig
from veneer.configs.names import PeftType, TaskType
from veneer.configs.value_checks import check_choice, check_not_negative
from veneer.errors import ConfigError


@dataclass
class CPTConfig(PromptConfig, peft_type=PeftType.CPT):
    """Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222): examples in the context, moved a little.

    Args, beside those of :class:`PromptConfig`:
        cpt_token_ids: the context's tokens; their number is ``num_virtual_tokens``.
        cpt_mask: which of them are not padding; kept for peft's sake.
        cpt_tokens_type_mask: the kind of each token; of the k-th example 4k + 1 (template of the input), 4k + 2
            (input), 4k + 3 (template of the output), 4k + 4 (label); 0 is neither trained nor counted.
        opt_weighted_loss_type: ``"none"``, or ``"decay"``: earlier examples' labels count less.
        opt_loss_decay_factor: the ratio of an example's weight to that of the next one.
        opt_projection_epsilon: how far an input's embedding may move, for a width of 2048.
        opt_projection_format_epsilon: the same for templates.
        tokenizer_name_or_path: where the ids came from; kept for peft's sake.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.cpt_token_ids = self.cpt_token_ids or [0]
        self.num_virtual_tokens = count = len(self.cpt_token_ids)
        self.cpt_mask = self.cpt_mask or [1] * count
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * count
        super().__post_init__()
        check_not_negative(self, "opt_projection_epsilon", "opt_projection_format_epsilon")
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(
                f"CPTConfig only supports task_type = CAUSAL_LM, causal language models, and it is {self.task_type}.",
                hint='Give task_type="CAUSAL_LM".',
            )
        if not len(self.cpt_mask) == len(self.cpt_tokens_type_mask) == count:
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask differ in length.", hint="Give one entry a token."
            )
        check_choice(self, "opt_weighted_loss_type", "none", "decay")
