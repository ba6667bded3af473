"""Implements :func:`veneer.bench`: measure a model with its adapters, merged and unmerged, and recommend one."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from veneer.benching.arguments import spread_over
from veneer.benching.bench_report import BenchReport
from veneer.benching.decide.cost_model import Requirements
from veneer.benching.decide.recommendation import recommend
from veneer.benching.evaluation_samples import read_samples
from veneer.benching.inputs import AdapterInput, Inventory, find_inputs
from veneer.benching.measure import machine
from veneer.benching.measure.fidelity import fidelity
from veneer.benching.measure.fresh_process import LOADS, Request, in_fresh_process, named
from veneer.benching.measure.models_compared import ModelsCompared, load_models, nbytes
from veneer.benching.measure.perplexity import WINDOW, perplexity_of
from veneer.benching.measure.progress import Progress, Timeline
from veneer.benching.measure.rounds import InputSize, SampleLog, measure, measure_merge, rotated
from veneer.benching.result import Fidelity, Figure, MeasuredAdapter, Perplexity, Setup
from veneer.errors import UsageError, VeneerError
from veneer.files.lookup_options import OFFLINE
from veneer.files.names import MODEL_STEM
from veneer.files.resolve import resolve
from veneer.files.weight_files import weight_files
from veneer.keywords import DTYPE, takes
from veneer.printing import quiet_transformers

# More fresh processes than this tell nothing new about loading.
_MOST_LOADS = 3


@quiet_transformers()
@takes(renamed=DTYPE)
def bench(
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    batch: Sequence[int] = (1, 8),
    prompt_tokens: Sequence[int] | None = None,
    new_tokens: int = 32,
    dtype: Any = "auto",
    device: str | None = None,
    prompts: str | Path | None = None,
    perplexity: str | Path | None = None,
    traffic: Mapping[str, float] | None = None,
    memory: float | None = None,
    requests_per_change: float | None = None,
    in_flight: int | None = None,
    repeats: int = 5,
    local_files_only: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BenchReport:
    """Measure the effect of merging on this machine, and recommend whether to merge.

    Leave the machine alone while it runs. Base, merged and unmerged share their weights in memory, and take turns in
    every round; loading is measured in fresh processes.

    Args:
        path: an adapter, a set of adapters, or a base model (then ``adapters`` names adapters of it).
        base: the base: a folder or hub id. By default what the adapter names.
        adapters: further adapters' paths; for a set also names of its members, which then are all that is taken of it.
        batch: rows of the inputs.
        prompt_tokens: tokens of a row; 128 and 512, as far as the model takes them, when ``None``.
        new_tokens: tokens of an answer, from 2 on.
        dtype: of the base; ``"auto"`` keeps that of its files.
        device: such as ``"cuda"``; the CPU when ``None``.
        prompts: a text file with a prompt on each line, for a model of text.
        perplexity: a text file, or JSON Lines with a record on each line, to measure how well base and adapters predict
            it.
        traffic: adapter -> its part of the requests, in any unit; equal parts when ``None``.
        memory: bytes that serving may take; all that the device has when ``None``.
        requests_per_change: requests between two changes of the adapters; ``None`` when they never change.
        in_flight: requests answered at the same time; the largest ``batch`` when ``None``.
        repeats: timed rounds.
        local_files_only: use no network.
        on_progress: called when a step begins.

    Returns:
        Every figure with its raw samples, and the recommendation. ``save(folder)`` writes it as HTML, Markdown and
        JSON.

    Raises:
        UsageError: an option does not fit this model. Also the errors of loading.
    """
    started = time.perf_counter()
    _check_numbers(batch, prompt_tokens, new_tokens, repeats, memory, requests_per_change, in_flight)
    samples = [] if perplexity is None else read_samples(Path(perplexity))
    torch_device = machine.device_of(device)
    inventory = find_inputs(path, base, adapters, local_files_only)
    shares = spread_over(traffic, [adapter.name for adapter in inventory.adapters])
    hottest_first = [next(a for a in inventory.adapters if a.name == name) for name in shares]
    on_progress(Progress("loading", 0.0, None))
    models = load_models(
        inventory,
        hottest_first,
        dtype=dtype,
        device=torch_device,
        prompts=prompts,
        samples=samples,
        local_files_only=local_files_only,
    )
    lengths = models.workload.lengths(tuple(prompt_tokens) if prompt_tokens else None, new_tokens)
    setup = _setup(str(path), inventory, hottest_first, models, lengths, sorted(set(batch)), new_tokens, repeats)
    setup = replace(setup, texts="" if perplexity is None else str(perplexity))
    timeline = Timeline(on_progress)
    sizes = [InputSize(rows, length) for rows in setup.batch for length in lengths or (0,)]
    request = _request(models, hottest_first, dtype, torch_device, sizes[-1], new_tokens)
    _plan_steps(timeline, setup, sizes, sum(text.count for text in models.texts))
    figures = [*measure(models, sizes, new_tokens, repeats, timeline, torch_device), *_bytes(models, hottest_first)]
    figures += measure_merge(models, repeats, timeline)
    fidelities = _compare(models, hottest_first, new_tokens, timeline)
    perplexities = _perplexities(models, hottest_first, timeline)
    warnings = models.warnings
    del models
    gc.collect()
    load_figures, notes = _loads_or_note(request, min(repeats, _MOST_LOADS), sizes[0], timeline)
    figures += load_figures
    requirements = Requirements(
        traffic=shares,
        memory=memory or machine.memory(torch_device) or math.inf,
        requests_per_change=requests_per_change or math.inf,
        in_flight=in_flight or max(setup.batch),
    )
    return BenchReport(
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        setup=setup,
        machine=machine.machine(torch_device),
        figures=tuple(figures),
        fidelity=tuple(fidelities),
        recommendation=recommend(setup, figures, fidelities, requirements, warnings, perplexities),
        notes=notes,
        seconds=time.perf_counter() - started,
        perplexity=tuple(perplexities),
    )


def _check_numbers(
    batch: Sequence[int],
    prompt_tokens: Sequence[int] | None,
    new_tokens: int,
    repeats: int,
    memory: float | None,
    requests_per_change: float | None,
    in_flight: int | None,
) -> None:
    least = {
        "batch": (1, min(batch, default=0)),
        "prompt_tokens": (1, min(prompt_tokens, default=0) if prompt_tokens is not None else None),
        "new_tokens": (2, new_tokens),
        "repeats": (1, repeats),
        "memory": (1, memory),
        "requests_per_change": (1, requests_per_change),
        "in_flight": (1, in_flight),
    }
    for name, (smallest, value) in least.items():
        if value is not None and not value >= smallest:
            raise UsageError(f"{name} must be at least {smallest}, not {value}.", hint="Leave it out for the default.")


def _request(
    models: ModelsCompared,
    adapters: Sequence[AdapterInput],
    dtype: Any,
    device: torch.device,
    size: InputSize,
    new_tokens: int,
) -> Request:
    """Ask for a load, and an answer to an input of a size, in a fresh process."""
    task = next(iter(models.single.peft_config.values())).task_type
    return Request(
        variant="base",
        base=models.base.name_or_path,
        adapters=named(adapters),
        task=None if task is None else str(task),
        model_class=type(models.base).__name__,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        rows=size.batch,
        length=size.length,
        new_tokens=new_tokens,
    )


def _setup(
    path: str,
    inventory: Inventory,
    adapters: Sequence[AdapterInput],
    models: ModelsCompared,
    lengths: tuple[int, ...],
    batch: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> Setup:
    entries = models.several.adapters.by_name
    named_base = next(iter(models.single.peft_config.values())).base_model_name_or_path
    facts = [
        MeasuredAdapter(a.name, a.origin, str(entries[a.name].config.peft_type), a.nbytes, len(entries[a.name].layers))
        for a in adapters
    ]
    return Setup(
        path=path,
        base=inventory.base or named_base or models.base.name_or_path,
        model_class=type(models.base).__name__,
        kind=models.workload.kind,
        unit=models.workload.unit,
        parameters=sum(parameter.numel() for parameter in models.base.parameters()),
        dtype=str(models.base.dtype).removeprefix("torch."),
        device=str(next(models.base.parameters()).device),
        adapters=tuple(facts),
        batch=tuple(batch),
        lengths=lengths,
        new_tokens=new_tokens if models.workload.decodes else 0,
        repeats=repeats,
        prompts=models.prompt_source,
    )


def _plan_steps(timeline: Timeline, setup: Setup, sizes: Sequence[InputSize], predicted: int) -> None:
    """Plan every step, with a guess of its seconds from the model's size."""
    variants = {size: 4 + (len(setup.adapters) > 1) * (1 + (size.batch > 1)) for size in sizes}
    for size in sizes:
        rows, steps = size.batch * (size.length or 256), setup.new_tokens or 1
        guess = setup.parameters * (rows / 1e11 + steps / 1e10)
        timeline.plan(str(size), variants[size] * setup.repeats, guess)
        timeline.plan(f"warm-up {size}", variants[size], setup.parameters * (rows / 1e11 + 2 / 1e10))
    timeline.plan("merge", setup.repeats, setup.parameters / 2e9)
    timeline.plan("fidelity", len(setup.adapters), setup.parameters * setup.new_tokens * 2e-9)
    if predicted:
        timeline.plan("perplexity", 1 + 2 * len(setup.adapters), setup.parameters * predicted / 1e11)
    timeline.plan("load", min(setup.repeats, _MOST_LOADS) * len(LOADS), 5 + setup.parameters / 5e8)


def _compare(
    models: ModelsCompared, adapters: Sequence[AdapterInput], new_tokens: int, timeline: Timeline
) -> list[Fidelity]:
    fidelities = []
    for adapter in adapters:
        with timeline.step("fidelity", f"comparing answers: {adapter.name}"):
            fidelities.append(fidelity(models, adapter.name, new_tokens))
    return fidelities


def _perplexities(models: ModelsCompared, adapters: Sequence[AdapterInput], timeline: Timeline) -> list[Perplexity]:
    if not models.texts:
        return []
    window = min(WINDOW, models.workload.limit or WINDOW)
    size = sum(text.count for text in models.texts), window

    def measured(model: Any, name: str) -> float:
        with timeline.step("perplexity", f"predicting the text: {name}"):
            return perplexity_of(model, models.texts, window)

    found = [Perplexity("", measured(models.base, "base alone"), None, *size)]
    for adapter in adapters:
        models.several.set_adapter(adapter.name)
        unmerged = measured(models.several, adapter.name)
        models.several.merge_adapter([adapter.name])
        try:
            merged = measured(models.several, f"{adapter.name}, merged")
        finally:
            models.several.unmerge_adapter()
        found.append(Perplexity(adapter.name, unmerged, merged, *size))
    return found


def _bytes(models: ModelsCompared, adapters: Sequence[AdapterInput]) -> list[Figure]:
    """Measure bytes in memory and on disk."""
    of_base = {id(tensor) for tensor in models.base.parameters()}
    merged = [tensor for tensor in models.merged.parameters() if id(tensor) not in of_base]
    log = SampleLog()
    log.add("weights", "base", nbytes([*models.base.parameters(), *models.base.buffers()]))
    log.add("weights", "merged", nbytes([*models.merged.parameters(), *models.merged.buffers()]))
    log.add("weights", "kept", nbytes(merged))
    for adapter in adapters:
        tensors = [tensor for _, tensor in models.several.adapters.named_tensors(adapter.name)]
        log.add("weights", f"adapter {adapter.name}", nbytes(tensors))
        log.add("disk", f"adapter {adapter.name}", adapter.nbytes)
    files = weight_files(resolve(models.base.name_or_path, OFFLINE, what="base"), MODEL_STEM)
    log.add("disk", "base", sum(file.stat().st_size for file in files))
    log.add("disk", "merged", nbytes(models.merged.parameters()))
    return log.figures("B")


def _loads_or_note(
    request: Request, repeats: int, smallest: InputSize, timeline: Timeline
) -> tuple[list[Figure], tuple[str, ...]]:
    """Measure loads; when they fail, give a note instead, for the other figures took minutes and hold without them."""
    try:
        return _loads(request, repeats, smallest, timeline), ()
    except VeneerError as error:
        return [], (f"Loading and peak memory are not measured, and memory is counted without them. {error}",)


def _loads(request: Request, repeats: int, smallest: InputSize, timeline: Timeline) -> list[Figure]:
    """Measure loads in fresh processes. The first of each variant answers the largest input, for its peak memory."""
    seconds, memory = SampleLog(), SampleLog()
    for turn in range(repeats):
        size = {} if turn == 0 else {"rows": smallest.batch, "length": smallest.length, "new_tokens": 2}
        for variant in rotated(LOADS, turn):
            with timeline.step("load", f"loading in a fresh process, {turn + 1} of {repeats}: {variant}"):
                costs = in_fresh_process(Request(**{**vars(request), **size, "variant": variant}))
            for quantity, value in costs.items():
                if quantity not in ("peak", "serving"):
                    seconds.add(quantity, variant, value)
                elif turn == 0:
                    memory.add(quantity, variant, value)
    return [*seconds.figures(), *memory.figures("B")]
