"""Veneer beside peft: runs the sections of ``workloads.py`` and writes ``RESULTS.md`` and ``results.svg``.

    python benchmarks/run.py [SECTION ...] [--model 135M] [--dtype bfloat16] [--rounds 2] [--quick] [--report]

Each measurement is a fresh process; the two sides alternate, and each figure is the median over the rounds. This kind
of machine drifts by up to a factor of two within minutes: ratios hold, absolute times are the machine's of that day.
What was measured is kept in ``results.json``, from which the report is made, so that the sections can be run one by
one. ``--quick`` runs one round on the small model alone and keeps nothing; ``--report`` only writes the report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import materials
import report
from workloads import SECTIONS

HERE = Path(__file__).parent
MODELS, DTYPES, SIDES = ("135M", "1B"), ("bfloat16", "float32"), ("veneer", "peft")
# Sections that say enough on one model in one dtype.
SMALL_ONLY = {"attach": "bfloat16", "mixed64": "bfloat16", "methods": "bfloat16", "save": "bfloat16"}
ONCE = {**SMALL_ONLY, "process": "bfloat16"}


def is_meant(section: str, model: str, dtype: str) -> bool:
    """Whether a section is run on a model in a dtype."""
    if section == "mixed" and dtype == "float32":
        return model == "135M"
    return section not in ONCE or (model == "135M" and dtype == ONCE[section])


def prepare(section: str, model: str) -> None:
    """Make what a section needs before its time is taken."""
    copies = {"mixed": 8, "mixed64": 64}.get(section, 0)
    materials.adapter(model)
    for copy in range(copies):
        materials.adapter(model, copy=copy + 1)
    if section == "methods":
        import veneer

        for name, (kind, _) in materials.METHODS.items():
            if hasattr(veneer, kind):
                materials.adapter(model, name)


def in_fresh_process(section: str, model: str, dtype: str, side: str) -> dict[str, float]:
    command = [sys.executable, str(HERE / "workloads.py"), section, model, dtype, side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(section: str, model: str, dtype: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """One run a round for each side, in turns."""
    prepare(section, model)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(in_fresh_process(section, model, dtype, side))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--model", choices=MODELS, help="both unless given")
    parser.add_argument("--dtype", choices=DTYPES, help="both unless given")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a look: one round, the small model, nothing kept")
    parser.add_argument("--report", action="store_true", help="write the report from what was measured before")
    asked = parser.parse_args()
    kept = report.read()
    for section in [] if asked.report else (asked.sections or SECTIONS):
        for model in [asked.model] if asked.model else MODELS[: 1 if asked.quick else 2]:
            for dtype in [asked.dtype] if asked.dtype else DTYPES[: 1 if asked.quick else 2]:
                if is_meant(section, model, dtype):
                    runs: Any = measure(section, model, dtype, 1 if asked.quick else asked.rounds)
                    report.show(section, model, dtype, runs)
                    kept[f"{section} {model} {dtype}"] = runs
                    if not asked.quick:
                        report.keep(kept)
    if not asked.sections and not asked.report:
        rest = ["--models", "135M"] if asked.quick else ["--keep"]
        subprocess.run([sys.executable, str(HERE / "merge_to_disk.py"), *rest], check=True)
    if not asked.quick:
        report.write(kept)


if __name__ == "__main__":
    main()
