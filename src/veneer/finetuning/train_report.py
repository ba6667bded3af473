"""The report of a training run, and the commands that come next."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

from veneer.printing import Report


@dataclass(frozen=True)
class TrainReport(Report):
    """The result of a training run.

    Attributes:
        data: the file of examples.
        base: the base model.
        out: the folder that was written: the adapter, and the last checkpoints below it.
        method: of the adapter.
        parameters: how many numbers were trained.
        examples: how many were trained on.
        validation_examples: how many were evaluated on.
        cut_examples: of those trained on, how many reach ``max_length``, and may have lost their end.
        max_length: of an example, in tokens.
        steps: of the optimiser, those before a resumption included.
        epochs: how often each example was seen.
        train_loss: the mean over this run; ``None`` where it had no steps left.
        eval_loss: at the end; ``None`` without validation.
        seconds: from start to end.
    """

    data: str
    base: str
    out: str
    method: str
    parameters: int
    examples: int
    validation_examples: int
    cut_examples: int
    max_length: int
    steps: int
    epochs: float
    train_loss: float | None
    eval_loss: float | None
    seconds: float

    _title = "training report"

    @property
    def next_commands(self) -> list[str]:
        """The commands that run, merge and measure the adapter."""
        return [
            shlex.join(["veneer", *words])
            for words in (
                ["generate", self.out, self.base, "--prompt", "Hello"],
                ["merge", self.out, self.base, "--out", f"{self.out}-merged"],
                ["bench", self.out, "--base", self.base],
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "next_commands": self.next_commands}

    def _facts(self) -> list[tuple[str, str]]:
        validation = f", {self.validation_examples} to evaluate on" if self.validation_examples else ""
        losses = {"train": self.train_loss, "eval": self.eval_loss}
        return [
            ("data", f"{self.data}: {self.examples} examples{validation}"),
            ("base", self.base),
            ("out", f"{self.out}: {self.method}, {self.parameters:,} trained numbers"),
            ("steps", f"{self.steps}, {self.epochs:.3g} epochs"),
            ("loss", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)),
            ("seconds", f"{self.seconds:.1f}"),
        ]

    def _warnings(self) -> list[str]:
        warnings = []
        if self.cut_examples:
            warnings.append(
                f"{self.cut_examples} of {self.examples} examples reach {self.max_length} tokens, and may be cut there"
            )
        if not all(math.isfinite(loss) for loss in (self.train_loss, self.eval_loss) if loss is not None):
            warnings.append("the loss is no number any more: try a lower learning rate")
        return warnings
