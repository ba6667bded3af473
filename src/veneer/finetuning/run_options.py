"""The options of a training run, and what they are to TRL's trainer; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from veneer.errors import UsageError


@dataclass(frozen=True)
class RunOptions:
    """The options of a training run, named as the arguments of :func:`veneer.train`."""

    epochs: float | None
    max_steps: int | None
    learning_rate: float
    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    gradient_checkpointing: bool
    save_steps: int | None
    logging_steps: int
    seed: int

    def check(self, validation_split: float | None) -> None:
        """Raise ``UsageError`` for a number that is out of its range."""
        least = {
            **{"max_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 2},
            **{"save_steps": 1, "logging_steps": 1, "seed": 0},
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} must be at least {smallest}, not {value}.")
        for name, value in (("epochs", self.epochs), ("learning_rate", self.learning_rate)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be over 0, not {value}.")
        if validation_split is not None and not 0 < validation_split < 1:
            raise UsageError(
                f"validation_split must lie between 0 and 1, not {validation_split}.", hint="Such as 0.05."
            )
        if self.epochs is not None and self.max_steps is not None:
            raise UsageError("Epochs and steps are both given.", hint="Leave out one of the two.")

    def arguments(self, validates: bool) -> dict[str, Any]:
        """Return the arguments of TRL's ``SFTConfig``; checkpoints and evaluations come at the same steps."""
        strategy = "epoch" if self.save_steps is None else "steps"
        every = 500 if self.save_steps is None else self.save_steps
        return {
            "num_train_epochs": 3.0 if self.epochs is None else self.epochs,
            "max_steps": -1 if self.max_steps is None else self.max_steps,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_length": self.max_length,
            "gradient_checkpointing": self.gradient_checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if self.gradient_checkpointing else None,
            "seed": self.seed,
            "save_strategy": strategy,
            "save_steps": every,
            "save_total_limit": 2,
            "eval_strategy": strategy if validates else "no",
            "eval_steps": every,
            "logging_steps": self.logging_steps,
            "report_to": "none",
            "disable_tqdm": True,
        }
