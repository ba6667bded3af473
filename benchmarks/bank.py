"""Measures banks of adapters: many adapters against one, and batches whose adapters come and go with each step.

    python benchmarks/bank.py [--model 135M] [--dtype bfloat16] [--method LoRA] [--rows 64] [--turns 9]
                              [--keep]

A step decodes one token of each row. "restacked" names the adapters by ``adapter_names=``, "bank" by a plan of leases;
"one" is one adapter for all rows, in the usual way and as rows of a bank. In "changing" one row's request ends with
each step and another adapter's begins. A join is a lease of an adapter that is in no slot and was folded ahead; "with
folding" it was not. All run on one model. `--keep` writes the figures beside those of other runs into `bank.json`, of
which `run.py --report` makes a table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import materials
from lines import Line, keep, tables
from workloads import Bench, Figures, decode, hush, in_turns, named, options, timed, tokens

RESULTS_FILE = Path(__file__).parent / "bank.json"
LINES = (
    Line("a step, {rows} adapters in a bank / one adapter", "steady, {rows} adapters, bank", "steady, one", most=1.25),
    Line("a step, {rows} adapters by `adapter_names=` / one", "steady, {rows} adapters, restacked", "steady, one"),
    Line("a step, 8 adapters in a bank / one", "steady, 8 adapters, bank", "steady, one", most=1.25),
    Line("a step, 8 adapters by `adapter_names=` / one", "steady, 8 adapters, restacked", "steady, one"),
    Line("a step, one adapter as rows of a bank / in the usual way", "steady, one, bank", "steady, one"),
    Line("a step of which one adapter joins, in a bank / by `adapter_names=`", "changing, bank", "changing, restacked"),
    Line("the same in a bank / with the same adapters", "changing, bank", "steady, {rows} adapters, bank"),
    Line("a join", "join"),
    Line("a join of an adapter that was not folded ahead", "join with folding"),
    Line("a leave", "leave"),
    Line("memory of an adapter in its slots", "an adapter, MB", unit="MB"),
    Line("memory of 8 slots", "slots, MB", unit="MB"),
)


def with_adapters(bench: Bench, method: str, count: int) -> Any:
    """Make a model with the adapters ``a0``, ``a1`` ..., which read one file; each has tensors of its own."""
    folder = materials.adapter(bench.model, method)
    model = bench.library.PeftModel.from_pretrained(bench.base(), folder, adapter_name="a0").eval()
    for index in range(1, count):
        model.load_adapter(folder, adapter_name=f"a{index}")
    return model


def steady(model: Any, rows: int, steps: int, turns: int) -> Figures:
    """Measure batches that stay the same: as many adapters as rows, or one."""
    bank = model.bank(slots=rows, rank_buckets=(16,))
    leases = [bank.lease(f"a{row}") for row in range(rows)]
    choices: dict[str, Any] = {
        f"{rows} adapters, restacked": [f"a{row}" for row in range(rows)],
        f"{rows} adapters, bank": bank.plan(leases),
        "8 adapters, restacked": [f"a{row % 8}" for row in range(rows)],
        "8 adapters, bank": bank.plan([leases[row % 8] for row in range(rows)]),
        "one, bank": bank.plan(leases[:1] * rows),
    }
    model.set_adapter("a0")
    actions = {name: decode(model, steps, rows, 4, adapter_names=choice) for name, choice in choices.items()}
    actions["one"] = decode(model, steps, rows, 4)
    figures = named("steady,", in_turns(actions, turns), steps)
    for lease in leases:
        lease.release()
    return figures


def changing(model: Any, rows: int, registered: int, steps: int, turns: int) -> Figures:
    """Measure batches of which one adapter leaves and another joins with each step."""
    import torch
    from transformers import DynamicCache

    ids, one = tokens(rows, 4), tokens(rows, 1)
    bank = model.bank(slots=rows, rank_buckets=(16,))
    leases = [bank.lease(f"a{row}") for row in range(rows)]
    names = [f"a{row}" for row in range(rows)]
    joined = {"bank": rows, "restacked": rows}

    def by_bank(row: int) -> Any:
        leases[row].release()
        leases[row] = bank.lease(f"a{joined['bank'] % registered}")
        return bank.plan(leases)

    def by_names(row: int) -> Any:
        names[row] = f"a{joined['restacked'] % registered}"
        return list(names)

    with torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values

    def action(kind: str, change: Callable[[int], Any]) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            for _ in range(steps):
                choice = change(joined[kind] % rows)
                joined[kind] += 1
                model(input_ids=one, past_key_values=cache, use_cache=True, adapter_names=choice)
            cache.crop(-steps)

        return run

    actions = {"bank": action("bank", by_bank), "restacked": action("restacked", by_names)}
    figures = named("changing,", in_turns(actions, turns), steps)
    for lease in leases:
        lease.release()
    return figures


def joins(model: Any, registered: int) -> Figures:
    """Measure joins and leaves alone, and the memory of the slots."""
    bank, names = model.bank(slots=8, rank_buckets=(16,)), [f"a{index}" for index in range(registered)]
    for name in names:  # afterwards none is folded ahead, and all but the last have given way
        bank.lease(name).release()
    taken: dict[str, list[float]] = {"join": [], "join with folding": [], "leave": []}
    for turn, name in enumerate(names):
        if turn % 2:
            bank.prepare(name)
        seconds, lease = timed(bank.lease, name)
        taken["join" if turn % 2 else "join with folding"].append(seconds)
        taken["leave"].append(timed(lease.release)[0])
    status = bank.status()
    figures = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return {**figures, "an adapter, MB": status.bytes_written / status.writes / 1e6, "slots, MB": status.nbytes / 1e6}


def measure(bench: Bench, method: str, rows: int, turns: int) -> Figures:
    registered, steps = 2 * rows, 2 if bench.large else 4
    model = with_adapters(bench, method, registered)
    figures = steady(model, rows, steps, turns) | changing(model, rows, registered, steps, turns)
    return {"rows": rows, **figures, **joins(model, registered)}


def table(results: dict[str, Figures]) -> str:
    """Write the figures as Markdown, a table for each run."""
    return tables(LINES, results)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--method", choices=tuple(materials.METHODS), default="LoRA")
    parser.add_argument("--rows", type=int, default=64)
    asked = parser.parse_args()
    hush()
    figures = measure(Bench("veneer", asked.model, asked.dtype), asked.method, asked.rows, asked.turns)
    print(json.dumps(figures, indent=1))
    if asked.keep:
        keep(RESULTS_FILE, f"{asked.model} {asked.dtype}, {asked.method}, {asked.rows} rows", figures)


if __name__ == "__main__":
    main()
