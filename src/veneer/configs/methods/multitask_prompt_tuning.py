"""The config of multitask prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.configs.methods.prompt_tuning import PromptTuningConfig
from veneer.configs.names import PeftType
from veneer.configs.value_checks import check_at_least_one
from veneer.errors import ConfigError

# Those of the second line take a checkpoint of source tasks.
INITS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")
FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig, peft_type=PeftType.MULTITASK_PROMPT_TUNING):
    """Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): one prompt, and a low-rank factor for each task.

    Args, beside those of :class:`PromptTuningConfig`:
        prompt_tuning_init: also ``"AVERAGE_SOURCE_TASKS"``, ``"EXACT_SOURCE_TASK"`` and ``"ONLY_SOURCE_SHARED"``: the
            prompt of a checkpoint of source tasks, with the mean of their factors, those of one, or new ones.
        prompt_tuning_init_state_dict_path: that checkpoint's safetensors file.
        prompt_tuning_init_task: which of its tasks.
        num_ranks: the rank of a task's factor.
        num_tasks: how many tasks.
    """

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "num_ranks", "num_tasks")
        if self.prompt_tuning_init in FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} has no source.",
                hint="Give prompt_tuning_init_state_dict_path, the source tasks' adapter_model.safetensors.",
            )

    def _check_init(self, known: tuple[str, ...]) -> None:
        super()._check_init((*INITS, *FROM_SOURCE))
