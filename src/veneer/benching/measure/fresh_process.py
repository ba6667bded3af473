"""Measures loading in fresh processes: only the disk's cache is warm, and the peak memory is that of the load.

python -m veneer.benching.measure.fresh_process < request.json        the command of such a process
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.benching.inputs import AdapterInput
from veneer.errors import VeneerError

# The loads: the base; the base and every adapter; the base with the hottest adapter merged into it.
LOADS = ("base", "unmerged", "merged")


@dataclass(frozen=True)
class Request:
    """The load and the answer that a fresh process measures.

    Attributes:
        variant: one of ``LOADS``.
        base: the base's path or id.
        adapters: names and folders; the hottest first.
        task: what the model is for.
        model_class: the transformers class of the base; its module is imported before anything is timed.
        dtype: of the base.
        device: of the base.
        rows: of the input.
        length: tokens of a row.
        new_tokens: of the answer.
    """

    variant: str
    base: str
    adapters: tuple[tuple[str, str], ...]
    task: str | None
    model_class: str
    dtype: str
    device: str
    rows: int
    length: int
    new_tokens: int


def named(adapters: Sequence[AdapterInput]) -> tuple[tuple[str, str], ...]:
    """Return names and folders of adapters, as a request has them."""
    return tuple((adapter.name, str(adapter.root)) for adapter in adapters)


def in_fresh_process(request: Request) -> dict[str, float]:
    """Measure a load in a fresh process: seconds ("import", "load", "attach") and bytes.

    The bytes are "peak", the most that the process held, and "serving", the most while it answered.

    Raises:
        VeneerError: the process failed.
    """
    package = str(Path(__file__).parent.parent.parent)
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "veneer.benching.measure.fresh_process"]
    text = json.dumps(asdict(request))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"it left with {done.returncode}")
        raise VeneerError(
            f"A fresh process could not load and run what this one did ({request.variant}): {reason}",
            hint="There may be too little memory: leave out large --batch and --prompt-tokens.",
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def load_and_answer(request: Request) -> dict[str, float]:
    """Measure a load in this process."""
    started = time.perf_counter()
    import transformers

    from veneer.benching.measure.machine import device_of, forget_peak, peak_memory
    from veneer.benching.measure.workloads import workload_of
    from veneer.peft_model.load import load

    getattr(transformers, request.model_class, None)
    device = device_of(request.device)
    imported = time.perf_counter()
    (name, root), *others = request.adapters
    options: dict[str, Any] = {"dtype": request.dtype, "task": request.task, "local_files_only": True}
    if request.variant == "base":
        model = load(request.base, **options)
    else:
        merge = request.variant == "merged"
        model = load(root, base=request.base, adapter_name=name, merge=merge, **options)
    attaching = time.perf_counter()
    if request.variant == "unmerged":
        for other, place in others:
            model.load_adapter(place, adapter_name=other)
    assert model.load_report is not None
    attached = model.load_report.seconds["adapters"] + time.perf_counter() - attaching
    model.to(device)
    loaded = time.perf_counter()
    workload = workload_of(model.get_base_model())
    inputs = {key: value.to(device) for key, value in workload.feed(request.rows, request.length).items()}
    loading = peak_memory(device)
    forget_peak(device)
    workload.run(model, inputs, request.new_tokens)
    serving = peak_memory(device)
    costs = {"import": imported - started, "load": loaded - imported, "peak": max(loading, serving), "serving": serving}
    if request.variant == "unmerged":
        costs["attach"] = attached / len(request.adapters)
    return costs


def main() -> None:
    """Answer the request on standard input."""
    values = json.loads(sys.stdin.read())
    values["adapters"] = tuple(map(tuple, values["adapters"]))
    print(json.dumps(load_and_answer(Request(**values))))


if __name__ == "__main__":
    main()
