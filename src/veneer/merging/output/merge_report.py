"""Defines the report of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.printing import Report, nbytes


@dataclass(frozen=True)
class MergeReport(Report):
    """The result of a merge.

    Attributes:
        adapter: the adapters' paths or ids, with their weights where they are not 1.
        base: the base model, and how it was found.
        out: the folder that was written.
        layers: adapted layers merged.
        saved_modules: modules of the adapters that replaced the base's.
        untied: parameters that share a tensor in the base and not in the output.
        dtype: of the merged weights.
        nbytes: bytes written.
        files: the files' names.
        changed_tensors: how many of the weights changed.
        survives: the share of the change's energy that rounding to ``dtype`` leaves.
        seconds: from start to end.
        warnings: for the user.
    """

    adapter: str
    base: str
    out: str
    layers: int
    saved_modules: list[str]
    untied: list[str]
    dtype: str
    nbytes: int
    files: list[str]
    changed_tensors: int
    survives: float
    seconds: float
    warnings: list[str] = field(default_factory=list)

    _title = "merge report"

    def _facts(self) -> list[tuple[str, str]]:
        merged = f"{self.layers} layers" + (f" and {', '.join(self.saved_modules)}" if self.saved_modules else "")
        share = f"{100 * self.survives:.2f} % of the change is left after rounding to {self.dtype}"
        facts = [
            ("adapter", self.adapter),
            ("base", self.base),
            ("merged", f"{merged}: {self.changed_tensors} tensors changed"),
            ("rounding", share),
            ("out", f"{self.out}: {len(self.files)} files, {nbytes(self.nbytes)}, {self.dtype}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return facts if not self.untied else [*facts, ("untied", ", ".join(self.untied))]

    def _warnings(self) -> list[str]:
        return self.warnings
