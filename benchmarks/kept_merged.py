"""Measures the merged copies that a model keeps beside its base (`keep_merged`): beside base, merged and unmerged.

    python benchmarks/kept_merged.py [--model 135M] [--dtype bfloat16] [--turns 9] [--keep]

All models run on one set of weights, and the merged model on the copies themselves, for time depends on where weights
lie. "kept" is the model with two adapters on which the copies of one are selected; "merged in place" is what
`merge_adapter` leaves. A switch is `set_adapter`; the step after it is the first under the other adapter. `--keep`
writes the figures beside those of other runs into `kept_merged.json`, of which `run.py --report` makes a table.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from lines import Line, keep, tables
from workloads import Bench, Figures, decode, hush, in_turns, named, on_the_same_weights, options, prefill, timed

RESULTS_FILE = Path(__file__).parent / "kept_merged.json"
BESIDE_MERGED = [
    (how, model)
    for how in ("decode, 1 rows", "decode, 8 rows", "prefill")
    for model in ("kept", "merged in place", "unmerged", "base")
]
LINES = (
    *(Line(f"{how}, {model} / merged", f"{how}, {model}", f"{how}, merged") for how, model in BESIDE_MERGED),
    Line("decode, 8 rows that name it, kept / merged", "decode, 8 rows that name it, kept", "decode, 8 rows, merged"),
    Line("a switch", "switch"),
    Line("first step after a switch to it / second, kept", "first step after it, kept", "second step, kept"),
    Line("the same, unmerged", "first step after it, unmerged", "second step, unmerged"),
    Line("make the copies", "keep"),
    Line("memory of the copies", "kept, MB", unit="MB"),
)


def models(bench: Bench) -> tuple[dict[str, Any], Figures]:
    """Make the models, and measure making the copies."""
    import torch

    kept = bench.with_adapters(2)
    seconds, report = timed(kept.keep_merged, "a0")
    base = on_the_same_weights(kept).unload()
    merged = on_the_same_weights(base)
    for site_id, layer in kept.adapters.layers.items():
        merged.get_submodule(site_id).weight = torch.nn.Parameter(layer.merged_copies["a0",].weight, False)
    unmerged, in_place = on_the_same_weights(kept), on_the_same_weights(kept)
    in_place.merge_adapter(["a0"])
    figures = {"keep": seconds, "kept, MB": report.nbytes / 1e6}
    return {"base": base, "merged": merged, "merged in place": in_place, "kept": kept, "unmerged": unmerged}, figures


def switches(model: Any, turns: int) -> Figures:
    """Measure a switch between a kept and an unmerged adapter, the first step after it, and the second."""
    step = decode(model, 1)
    taken: dict[str, list[float]] = {}
    for name in ("a0", "a1") * (turns + 1):
        words = {"a0": "kept", "a1": "unmerged"}[name]
        taken.setdefault("switch", []).append(timed(model.set_adapter, name)[0])
        taken.setdefault(f"first step after it, {words}", []).append(timed(step)[0])
        taken.setdefault(f"second step, {words}", []).append(timed(step)[0])
    model.set_adapter("a0")
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def measure(bench: Bench, turns: int) -> Figures:
    compared, figures = models(bench)
    steps = 4 if bench.large else 16
    for rows in (1, 8):
        taken = in_turns({name: decode(model, steps, rows) for name, model in compared.items()}, turns)
        figures |= named(f"decode, {rows} rows,", taken, steps)
    figures |= named("prefill", in_turns({n: prefill(m, bench.prompt) for n, m in compared.items()}, bench.few))
    one_adapter = {"adapter_names": ["a0"] * 8}
    rows = in_turns({"kept": decode(compared["kept"], steps, 8, **one_adapter)}, turns)
    figures |= named("decode, 8 rows that name it,", rows, steps)
    return {**figures, **switches(compared["kept"], turns)}


def table(results: dict[str, Figures]) -> str:
    """Write the figures as Markdown, a table for each run."""
    return tables(LINES, results)


def main() -> None:
    asked = options(__doc__).parse_args()
    hush()
    figures = measure(Bench("veneer", asked.model, asked.dtype), asked.turns)
    print(json.dumps(figures, indent=1))
    if asked.keep:
        keep(RESULTS_FILE, f"{asked.model} {asked.dtype}", figures)


if __name__ == "__main__":
    main()
