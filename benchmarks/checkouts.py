"""Compares the speed of two checkouts of Veneer, before and after a change of the source.

    python benchmarks/checkouts.py OLD [NEW] [--rounds 3] [--sections attach forward ...]

``OLD`` and ``NEW`` are folders of checkouts; ``NEW`` is this one unless given. Each measurement is a fresh process on
SmolLM2-135M that runs a section of this checkout's ``workloads.py`` on the other's ``src``. The two take turns, each
goes first in every other round, and a figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import materials
import workloads

HERE = Path(__file__).parent
# Sixteen adapters say how attaching grows; the peer is not waited for.
LAST = {("veneer", "135M"): 16}
SECTIONS = {
    "attach": ("bfloat16",),
    "forward": ("bfloat16", "float32"),
    "mixed": ("bfloat16",),
    "merge": ("bfloat16",),
    "commands": ("bfloat16",),
}
Figures = dict[str, float]


def commands(bench: workloads.Bench) -> Figures:
    """Time whole processes: ``import veneer``, ``veneer inspect`` and ``veneer merge``."""
    adapter, base = (str(folder) for folder in (materials.adapter(bench.model), materials.base(bench.model)))

    def whole(*command: str) -> float:
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return workloads.timed(subprocess.run, [sys.executable, *command], **quiet)[0]

    def merge() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return whole("-m", "veneer", "merge", adapter, "--base", base, "--out", f"{folder}/merged")

    started = min(whole("-c", "pass") for _ in range(5))
    return {
        "import veneer": min(whole("-c", "import veneer") for _ in range(5)) - started,
        "veneer inspect": min(whole("-m", "veneer", "inspect", adapter) for _ in range(5)),
        "veneer merge": min(merge() for _ in range(4)),
    }


def measure(section: str, dtype: str) -> Figures:
    """Measure a section in this process."""
    workloads.LAST = {**workloads.LAST, **LAST}
    gc.disable()  # else it falls on one figure or another, by chance
    bench = workloads.Bench("veneer", "135M", dtype)
    return commands(bench) if section == "commands" else workloads.SECTIONS[section](bench)


def of_checkout(checkout: Path, section: str, dtype: str) -> Figures:
    """Measure a section in a fresh process that imports a checkout's source."""
    code = f"import checkouts, json; print(json.dumps(checkouts.measure({section!r}, {dtype!r})))"
    paths = {"PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(HERE)])}
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    out = subprocess.check_output([sys.executable, "-c", code], text=True, env={**os.environ, **paths, **quiet})
    figures: Figures = json.loads(out.splitlines()[-1])
    return figures


def compared(checkouts: Sequence[Path], section: str, dtype: str, rounds: int) -> str:
    """Write the lines of a table with a section's figures: before, after, and their ratio."""
    runs: tuple[list[Figures], list[Figures]] = ([], [])
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            runs[index].append(of_checkout(checkouts[index], section, dtype))
    lines = []
    for name in runs[0][0]:
        old, new = (statistics.median(figures[name] for figures in side) for side in runs)
        lines.append(f"| {name} | {dtype} | {old:.4g} | {new:.4g} | {new / old:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=HERE.parent)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    asked = parser.parse_args()
    checkouts = [asked.old.resolve(), asked.new.resolve()]
    print("| figure | dtype | before | after | after / before |\n|---|---|---|---|---|", flush=True)
    for section in asked.sections:
        for dtype in SECTIONS[section]:
            print(compared(checkouts, section, dtype, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
