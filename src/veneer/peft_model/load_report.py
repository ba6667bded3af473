"""Reports what a load found, bound and made active: ``model.load_report``, which rich prints as a table."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from veneer.adapters.adapter import Adapter
from veneer.adapters.collection import Adapters
from veneer.adapters.merge.kept_copies import MergedCopiesReport
from veneer.checkpoints.checkpoint import Checkpoint
from veneer.printing import Report, nbytes


@dataclass
class AdapterReport:
    """Reports on one adapter of a load.

    Attributes:
        name: its name on the model.
        origin: the path or id that it came from.
        peft_type: its method.
        tensors_bound: number of its checkpoint's tensors that are in use.
        tensors_total: number of tensors in its checkpoint.
        nbytes: their bytes on disk.
        dtypes: their dtypes in memory.
        layers: the layers that it adapts.
        zero_layers: the layers in which it changes nothing.
        saved_modules: the modules that it brings whole.
        virtual_tokens: number of tokens that a prompt puts before the input or into the cache.
        unexpected_keys: the keys of its checkpoint's tensors that are not in use; none with ``strict``.
        base_check: the base beside the one that the adapter records: "same", "different", "not recorded", "not known".
        notes: remarks on how it was read.
    """

    name: str
    origin: str
    peft_type: str
    tensors_bound: int
    tensors_total: int
    nbytes: int
    dtypes: list[str]
    layers: list[str]
    zero_layers: list[str]
    saved_modules: list[str]
    virtual_tokens: int = 0
    unexpected_keys: list[str] = field(default_factory=list)
    base_check: str = "not recorded"
    notes: list[str] = field(default_factory=list)

    @property
    def missing_keys(self) -> list[str]:
        """Empty: a layer of which the checkpoint has not every tensor is not adapted."""
        return []

    @property
    def changed_layers(self) -> list[str]:
        """The layers that carry a non-zero change."""
        return [name for name in self.layers if name not in set(self.zero_layers)]


@dataclass
class LoadReport(Report):
    """Reports on a call of :func:`veneer.load` or ``PeftModel.from_pretrained``.

    Attributes:
        path: the path or id that was asked for.
        kind: what is there: "model", "adapter", "model+adapter", "set of adapters".
        base: the place of the base model, and why it is this one.
        model_class: the base model's class.
        dtype: the base's dtype.
        merged: the adapter was merged into the base.
        active: the adapters that are active.
        adapters: a report for each adapter.
        seconds: durations of "base", "adapters" and "total".
        warnings: things to know before relying on the model.
        merged_copies: the merged copies that are kept beside the base; ``None`` without any.
    """

    path: str
    kind: str = "adapter"
    base: str = "the model given"
    model_class: str = ""
    dtype: str = ""
    merged: bool = False
    active: list[str] = field(default_factory=list)
    adapters: list[AdapterReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    merged_copies: MergedCopiesReport | None = None

    _title = "load report"

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("path", f"{self.path} ({self.kind})"),
            ("base", f"{self.base}: {self.model_class}, {self.dtype}"),
        ]
        for adapter in self.adapters:
            facts.append((f"adapter {adapter.name}", _adapter_line(adapter)))
        state = "merged into the base" if self.merged else ", ".join(self.active) or "none: the base alone"
        facts.append(("active", state))
        if self.merged_copies is not None:
            facts.append(("merged copies", self.merged_copies.summary))
        facts.append(("seconds", ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items())))
        return facts

    def _warnings(self) -> list[str]:
        return [*self.warnings, *([] if self.merged_copies is None else self.merged_copies.warnings)]

    def _border(self) -> str:
        return "cyan"


def _adapter_line(adapter: AdapterReport) -> str:
    parts = [
        f"{adapter.peft_type}, {adapter.tensors_bound} of {adapter.tensors_total} tensors bound",
        f"{nbytes(adapter.nbytes)} {'/'.join(adapter.dtypes)}",
        f"{adapter.virtual_tokens} virtual tokens"
        if adapter.virtual_tokens
        else f"{len(adapter.changed_layers)} of {len(adapter.layers)} layers carry a change",
    ]
    if adapter.saved_modules:
        parts.append(f"whole modules: {', '.join(adapter.saved_modules)}")
    parts.append(f"base digest: {adapter.base_check}")
    return "; ".join(parts)


class LoadLog:
    """Keeps the report of a model's last load, and lets it say what is on the model and active."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self.report: LoadReport | None = None

    def loaded(self, adapter: Adapter, checkpoint: Checkpoint, base_check: str) -> AdapterReport:
        """Add an adapter that has been loaded from ``checkpoint``, and return its report."""
        report = _adapter_report(adapter, checkpoint, base_check, self._adapters)
        if self.report is None:
            self.report = LoadReport(path=report.origin)
        self.report.adapters = [a for a in self.report.adapters if a.name != report.name] + [report]
        self.report.warnings += _warnings_of(report)
        self.sync()
        return report

    def sync(self) -> None:
        """Drop the adapters that are gone, and note which are active."""
        if self.report is not None:
            self.report.adapters = [a for a in self.report.adapters if a.name in self._adapters.by_name]
        self.note_active()

    def note_active(self) -> None:
        """Note which adapters are active."""
        if self.report is not None:
            self.report.active = list(self._adapters.active_selection.default.names)

    def rename(self, old: str, new: str) -> None:
        """Follow an adapter that has got another name."""
        for adapter in self.report.adapters if self.report is not None else ():
            if adapter.name == old:
                adapter.name = new
        self.sync()

    def finish(self, started: float) -> None:
        """Note the base's class and dtype, and the seconds since ``started``."""
        if self.report is not None:
            base = self._adapters.model
            self.report.model_class = type(base).__name__
            self.report.dtype = str(getattr(base, "dtype", "")).removeprefix("torch.")
            self.report.seconds["total"] = time.perf_counter() - started


def _adapter_report(adapter: Adapter, checkpoint: Checkpoint, base_check: str, adapters: Adapters) -> AdapterReport:
    return AdapterReport(
        name=adapter.name,
        origin=checkpoint.origin,
        peft_type=str(adapter.config.peft_type),
        tensors_bound=adapter.tensors_bound,
        tensors_total=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        dtypes=sorted(str(dtype).removeprefix("torch.") for dtype in adapter.dtypes()),
        layers=adapter.layers.names,
        zero_layers=list(adapter.layers.zero),
        saved_modules=adapter.whole_modules.names,
        virtual_tokens=adapter.virtual_tokens,
        unexpected_keys=list(adapter.unused_keys),
        base_check=base_check,
        notes=list(adapter.notes),
    )


def _warnings_of(adapter: AdapterReport) -> list[str]:
    warnings = [f"{adapter.name}: {note}" for note in adapter.notes]
    if not (adapter.changed_layers or adapter.saved_modules or adapter.virtual_tokens):
        warnings.append(
            f"{adapter.name}: zero-effect adapter: every change is zero, so the model answers as its base does. "
            "It may have been saved before training."
        )
    if adapter.base_check == "different":
        warnings.append(f"{adapter.name}: the base is not the one it was trained on.")
    return warnings
