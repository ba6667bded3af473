"""Measures every variant in every round, in turns, so that a drift of the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice

import torch

from veneer.benching.measure.models_compared import ModelsCompared
from veneer.benching.measure.progress import Timeline
from veneer.benching.measure.workloads import Inputs, now
from veneer.benching.result import VARIANTS, Figure
from veneer.errors import UnsupportedError, VeneerError

# Tokens of a warm-up's answer: enough to touch the code and the memory of a longer one.
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
class SampleLog:
    """Keeps samples by quantity, variant and size, in the order in which they were taken."""

    samples: dict[tuple[str, str, int | None, int | None], list[float]] = field(default_factory=dict)

    def add(self, quantity: str, variant: str, value: float, size: InputSize | None = None) -> None:
        """Keep one sample."""
        batch, length = (size.batch, size.length or None) if size else (None, None)
        self.samples.setdefault((quantity, variant, batch, length), []).append(value)

    def figures(self, unit: str = "s") -> list[Figure]:
        """Return a figure for each quantity, variant and size."""
        return [Figure(q, v, unit, tuple(values), b, n) for (q, v, b, n), values in self.samples.items()]


def variants(models: ModelsCompared, size: InputSize, log: SampleLog) -> dict[str, Run]:
    """Return variant -> the function that runs it, for the variants that make sense at this size."""
    workload, several = models.workload, models.several
    names = list(several.peft_config)
    runs: dict[str, Run] = {
        "base": lambda inputs, n: workload.run(models.base, inputs, n),
        "merged": lambda inputs, n: workload.run(models.merged, inputs, n),
        "unmerged": lambda inputs, n: workload.run(models.single, inputs, n),
    }
    if models.resident is not None:
        runs["resident"] = lambda inputs, n: workload.run(models.resident, inputs, n)
    if len(names) == 1:
        return _in_order(runs)
    turns = cycle(names)

    def switched(inputs: Inputs, n: int) -> dict[str, float]:
        started = time.perf_counter()
        several.set_adapter(next(turns))
        log.add("switch", "switching", time.perf_counter() - started)
        return workload.run(several, inputs, n)

    runs["switching"] = switched
    if size.batch > 1:
        rows = list(islice(cycle(names), size.batch))
        runs["mixed"] = lambda inputs, n: workload.run(several, inputs, n, adapter_names=rows)
    return _in_order(runs)


def _in_order(runs: dict[str, Run]) -> dict[str, Run]:
    return {name: runs[name] for name in VARIANTS if name in runs}


def measure(
    models: ModelsCompared,
    sizes: Sequence[InputSize],
    new_tokens: int,
    repeats: int,
    timeline: Timeline,
    device: torch.device,
) -> list[Figure]:
    """Run every variant at every size ``repeats`` times, after a warm-up of each.

    Raises:
        UnsupportedError: one of them does not run at one of the sizes.
    """
    log = SampleLog()
    inputs: dict[InputSize, Inputs] = {}
    runs = {size: variants(models, size, log) for size in sizes}
    for size in sizes:
        for name, run in runs[size].items():
            with timeline.step(f"warm-up {size}", f"warming up, {size}: {VARIANTS[name]}"), _refusal(name, size):
                inputs[size] = inputs.get(size) or _moved(models.workload.feed(size.batch, size.length), device)
                run(inputs[size], min(_WARM, new_tokens))
    for turn in range(repeats):
        for size in sizes:
            for name in rotated(list(runs[size]), turn):
                with timeline.step(str(size), f"round {turn + 1} of {repeats}, {size}: {VARIANTS[name]}"):
                    seconds_by_quantity = runs[size][name](inputs[size], new_tokens)
                for quantity, seconds in seconds_by_quantity.items():
                    log.add(quantity, name, seconds, size)
    return log.figures()


def measure_merge(models: ModelsCompared, repeats: int, timeline: Timeline) -> list[Figure]:
    """Measure merging the hottest adapter and unmerging it again, and making the copy of its merged weights."""
    log = SampleLog()
    model, resident, row = models.single, models.resident, models.questions[0]

    def timed(quantity: str, variant: str, act: Callable[[], object]) -> None:
        started = now(row)
        act()
        log.add(quantity, variant, now(row) - started)

    for turn in range(repeats):
        with timeline.step("merge", f"merging, {turn + 1} of {repeats}"):
            timed("merge", "merged", model.merge_adapter)
            timed("unmerge", "merged", model.unmerge_adapter)
            if resident is not None:
                resident.drop_merged()
                timed("keep", "resident", partial(resident.keep_merged, resident.active_adapter))
    return log.figures()


@contextmanager
def _refusal(variant: str, size: InputSize) -> Iterator[None]:
    """Turn whatever keeps a model from running, such as too little memory, into one error that names the variant."""
    try:
        yield
    except Exception as error:  # each model and backend has its own
        text = error.message if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnsupportedError(
            f"This cannot be measured: {VARIANTS[variant]}, {size}. {text}",
            hint="Leave out large --batch and --prompt-tokens, or measure the adapters one by one.",
        ) from error


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Return the names, beginning with another one in each round, so that their order has no effect."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: values.to(device) for name, values in inputs.items()}
