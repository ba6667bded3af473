"""Reports on a conversion: to a plain LoRA, to another tool's format, or both."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.formats.format import Step
from veneer.printing import Report

# Errors up to this come from float32, not from the rank.
ROUNDING = 1e-5


@dataclass(frozen=True)
class ConversionReport(Report):
    """Reports on a conversion.

    Attributes:
        adapter: the adapter that was converted.
        method: its ``peft_type``.
        out: the folder or file that was written.
        rank: the rank of the LoRA; the largest where layers have different ones.
        error: the relative error over all layers together, 0 to 1.
        errors: layer -> its relative error.
        source: the format of the adapter.
        to: the format of what was written.
        steps: what was done to the modules: each step's kind is ``"exact"``, ``"folded"``, ``"padded"`` or
            ``"approximated"``.
        notes: what was decided while the adapter was read.
    """

    adapter: str
    method: str
    out: str
    rank: int
    error: float
    errors: dict[str, float]
    source: str = "PEFT"
    to: str = "PEFT"
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    _title = "conversion report"

    @property
    def worst(self) -> str:
        """The layer with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])

    def _facts(self) -> list[tuple[str, str]]:
        written = f"LoRA of rank {self.rank}" if self.rank else self.method
        steps = [(step.kind, f"{step.what}: {_places(step.modules)}") for step in self.steps]
        return [
            ("adapter", f"{self.adapter} ({self.method}, {self.source})"),
            ("out", f"{self.out}: {written} on {len(self.errors)} layers, {self.to}"),
            *steps,
            ("left out", self._left_out()),
        ]

    def _left_out(self) -> str:
        largest = max([self.error, *self.errors.values()])
        if self.steps and largest == 0.0:  # without steps a LoRA was computed, in float32
            return "nothing: the change is exactly the same"
        if largest < ROUNDING:
            return f"nothing but rounding: the {'LoRA' if self.rank else 'adapter'} makes the same change"
        return f"{self.error:.2%} of the change; the most, {self.errors[self.worst]:.2%}, in {self.worst}"

    def _warnings(self) -> list[str]:
        return list(self.notes)


def _places(modules: tuple[str, ...]) -> str:
    return modules[0] if len(modules) == 1 else f"{len(modules)} modules"
