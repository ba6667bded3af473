"""The config of prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.configs.base import PromptConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_choice
from veneer.errors import ConfigError

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass
class PromptTuningConfig(PromptConfig, peft_type=PeftType.PROMPT_TUNING):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained embeddings before the input's own.

    Args, beside those of :class:`PromptConfig`:
        prompt_tuning_init: the initial embeddings: ``"RANDOM"``, ``"SAMPLE_VOCAB"`` (those of random tokens) or
            ``"TEXT"`` (those of a text's tokens, repeated to length).
        prompt_tuning_init_text: the text.
        tokenizer_name_or_path: the tokenizer of that text.
        tokenizer_kwargs: options of loading that tokenizer.
    """

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_init(INITS)

    def _check_init(self, known: tuple[str, ...]) -> None:
        text = self.prompt_tuning_init == "TEXT"
        check_choice(self, "prompt_tuning_init", *known)
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, name):
                raise ConfigError(
                    f"When prompt_tuning_init='TEXT', {name} can't be None.",
                    hint="Give the text and its tokenizer: prompt_tuning_init_text and tokenizer_name_or_path.",
                )
        if self.tokenizer_kwargs and not text:
            raise ConfigError(
                "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.",
                hint='Leave it out, or choose prompt_tuning_init="TEXT".',
            )
