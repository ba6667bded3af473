"""Measures banks of adapters: many adapters against one, and batches whose adapters come and go with each step.

    python benchmarks/bank.py [--model 135M] [--dtype bfloat16] [--method LoRA] [--rows 64] [--turns 9]

A step decodes one token of each row. "restacked" names the adapters by ``adapter_names=``, "bank" by a plan of leases;
"one" is one adapter for all rows, in the usual way and as rows of a bank. In "changing" one row's request ends with
each step and another adapter's begins. A join is a lease of an adapter that is in no slot and was folded ahead; "with
folding" it was not. All run on one model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import materials
from workloads import Bench, Figures, decode, in_turns, named, timed, tokens


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
    return figures | joins(model, registered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("135M", "1B"), default="135M")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--method", choices=tuple(materials.METHODS), default="LoRA")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    asked = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
    print(
        json.dumps(measure(Bench("veneer", asked.model, asked.dtype), asked.method, asked.rows, asked.turns), indent=1)
    )


if __name__ == "__main__":
    main()
