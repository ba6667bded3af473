"""The measurement itself: every variant in every round, in turns, so that what drifts drifts for all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch

from veneer.benching.measure.models_compared import ModelsCompared
from veneer.benching.measure.progress import Timeline
from veneer.benching.measure.workloads import Inputs, now
from veneer.benching.result import VARIANTS, Figure
from veneer.errors import UnsupportedError, VeneerError

# Tokens of a warm-up's answer: enough to touch all that a longer one does.
_WARM = 2


@dataclass(frozen=True)
class InputSize:
    """A size of input: rows, and tokens of a row (0 where it has one size)."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}" if self.length else f"batch of {self.batch}"


Run = Callable[[Inputs, int], dict[str, float]]


@dataclass
class Collected:
    """Samples by what they are of, in the order in which they were taken."""

    samples: dict[tuple[str, str, int | None, int | None], list[float]] = field(default_factory=dict)

    def add(self, quantity: str, variant: str, value: float, cell: InputSize | None = None) -> None:
        """Keep one sample."""
        batch, length = (cell.batch, cell.length or None) if cell else (None, None)
        self.samples.setdefault((quantity, variant, batch, length), []).append(value)

    def figures(self, unit: str = "s") -> list[Figure]:
        """A figure for each quantity, variant and size."""
        return [Figure(q, v, unit, tuple(values), b, n) for (q, v, b, n), values in self.samples.items()]


def variants(subjects: ModelsCompared, cell: InputSize, collected: Collected) -> dict[str, Run]:
    """Variant -> how it is run, for those that make sense at this size."""
    workload, several = subjects.workload, subjects.several
    names = list(several.peft_config)
    found: dict[str, Run] = {
        "base": lambda inputs, n: workload.run(subjects.base, inputs, n),
        "merged": lambda inputs, n: workload.run(subjects.merged, inputs, n),
        "unmerged": lambda inputs, n: workload.run(subjects.single, inputs, n),
    }
    if len(names) == 1:
        return found
    turns = cycle(names)

    def switched(inputs: Inputs, n: int) -> dict[str, float]:
        started = time.perf_counter()
        several.set_adapter(next(turns))
        collected.add("switch", "switching", time.perf_counter() - started)
        return workload.run(several, inputs, n)

    found["switching"] = switched
    if cell.batch > 1:
        rows = list(islice(cycle(names), cell.batch))
        found["mixed"] = lambda inputs, n: workload.run(several, inputs, n, adapter_names=rows)
    return {name: found[name] for name in VARIANTS if name in found}


def measure(
    subjects: ModelsCompared,
    cells: Sequence[InputSize],
    new_tokens: int,
    repeats: int,
    timeline: Timeline,
    device: torch.device,
) -> list[Figure]:
    """Run every variant at every size ``repeats`` times, after a warm-up of each.

    Raises:
        UnsupportedError: one of them does not run at one of the sizes.
    """
    collected = Collected()
    inputs: dict[InputSize, Inputs] = {}
    runs = {cell: variants(subjects, cell, collected) for cell in cells}
    for cell in cells:
        for name, run in runs[cell].items():
            with timeline.step(f"warm-up {cell}", f"warming up, {cell}: {VARIANTS[name]}"), _refusal(name, cell):
                inputs[cell] = inputs.get(cell) or _moved(subjects.workload.feed(cell.batch, cell.length), device)
                run(inputs[cell], min(_WARM, new_tokens))
    for turn in range(repeats):
        for cell in cells:
            for name in rotated(list(runs[cell]), turn):
                with timeline.step(str(cell), f"round {turn + 1} of {repeats}, {cell}: {VARIANTS[name]}"):
                    took = runs[cell][name](inputs[cell], new_tokens)
                for quantity, seconds in took.items():
                    collected.add(quantity, name, seconds, cell)
    return collected.figures()


def measure_merge(subjects: ModelsCompared, repeats: int, timeline: Timeline) -> list[Figure]:
    """Merge the hottest adapter and take it out again."""
    collected = Collected()
    model, row = subjects.single, subjects.questions[0]
    for turn in range(repeats):
        with timeline.step("merge", f"merging, {turn + 1} of {repeats}"):
            for quantity, act in (("merge", model.merge_adapter), ("unmerge", model.unmerge_adapter)):
                started = now(row)
                act()
                collected.add(quantity, "merged", now(row) - started)
    return collected.figures()


@contextmanager
def _refusal(variant: str, cell: InputSize) -> Iterator[None]:
    """What keeps a model from running, such as too little memory, as one error that says what was tried."""
    try:
        yield
    except Exception as error:  # each model and backend has its own
        text = error.message if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnsupportedError(
            f"This cannot be measured: {VARIANTS[variant]}, {cell}. {text}",
            hint="Leave out large --batch and --prompt-tokens, or measure the adapters one by one.",
        ) from error


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names, beginning elsewhere in each round: none always comes after the same other."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: values.to(device) for name, values in inputs.items()}
