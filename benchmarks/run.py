"""Compares Veneer with peft: runs the sections of ``workloads.py``, and writes their report.

    python benchmarks/run.py [SECTION ...] [--model 135M] [--dtype bfloat16] [--rounds 3] [--minutes 45] [--resume]
                             [--quick] [--report]

The report is ``RESULTS.md``, ``results.svg`` and the README's table.

Each measurement is a fresh process; the two sides alternate, and each figure is the median over the rounds. This kind
of machine drifts by up to a factor of two within minutes: ratios hold, absolute times are the machine's of that day.

A round goes through all sections before the next begins, so that the time given is spent evenly: what it does not
suffice for is left out of the later rounds, and said. What was measured is kept in ``results.json`` after each
measurement, from which the report is made, so that sections can be run one by one and a run that was broken off be
taken up with ``--resume``. A measurement that fails or takes too long is reported, and the others go on. ``--quick``
runs one round on the small model alone and keeps nothing; ``--report`` only writes the report.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import materials
import report
from workloads import SECTIONS

HERE = Path(__file__).parent
MODELS, DTYPES, SIDES = ("135M", "1B"), ("bfloat16", "float32"), ("veneer", "peft")
# Sections that say enough on one model, in one dtype.
SMALL_ONLY = frozenset({"mixed64", "methods", "save", "process"})
BFLOAT16_ONLY = frozenset({*SMALL_ONLY, "attach"})
# Seconds after which one measurement is given up; one of a method.
LIMIT, LIMIT_OF_A_METHOD = 240, 100
# The section that runs once for each method, each in processes of its own: ``methods:LoRA``.
METHODS = "methods"


@dataclass(frozen=True)
class Job:
    """A section on a model in a dtype; the section ``methods`` with one of them after a colon."""

    section: str
    model: str
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.section} {self.model} {self.dtype}"

    @property
    def method(self) -> str:
        return self.section.partition(":")[2]

    @property
    def is_meant(self) -> bool:
        section = METHODS if self.method else self.section
        if section == "mixed" and self.dtype == "float32":
            return self.model == "135M"
        return not (section in SMALL_ONLY and self.model != "135M") and not (
            section in BFLOAT16_ONLY and self.dtype != "bfloat16"
        )

    def prepare(self) -> None:
        """Make the section's models before its time is taken."""
        copies = {"mixed": 8, "mixed64": 64}.get(self.section, 0)
        materials.adapter(self.model)
        for copy in range(copies):
            materials.adapter(self.model, copy=copy + 1)
        if self.method:
            materials.adapter(self.model, self.method)

    def run(self, side: str, limit: float) -> dict[str, float]:
        """Measure one side in a fresh process; raise ``RuntimeError`` when it fails or takes too long."""
        command = [sys.executable, str(HERE / "workloads.py"), self.section, self.model, self.dtype, side]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            out, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"not done after {limit:.0f} s") from error
        finally:  # also when the run is broken off: what goes on would disturb the next measurement
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            said = [line for line in errors.splitlines() if line.strip()]
            raise RuntimeError(said[-1] if said else f"exit code {process.returncode}")
        figures: dict[str, float] = json.loads(out.splitlines()[-1])
        return figures


@dataclass
class Run:
    """One run through the jobs, in rounds, until the time is over.

    Attributes:
        results: what is measured, as in the file.
        until: when it has to be over, on the clock of ``time.monotonic``.
        is_saved: whether it is written to the file.
        took: job and side -> how long it took the last time.
    """

    results: report.Results
    until: float
    is_saved: bool
    took: dict[tuple[Job, str], float] = field(default_factory=dict)

    def round(self, jobs: Iterable[Job], number: int) -> None:
        """Measure each job once on each side, but those that have as many rounds already or failed."""
        for job in jobs:
            for side in SIDES if number % 2 else reversed(SIDES):
                done = len(self.results.get(job.key, {}).get(side, []))
                if done < number and (job.key, side) not in self._failed():
                    self._measure(job, side)
            if job.key in self.results:
                report.show(job.key, self.results[job.key])

    def _measure(self, job: Job, side: str) -> None:
        left = self.until - time.monotonic()
        if left < self.took.get((job, side), 0):
            print(f"{job.key}, {side}: no time left for it")
            return
        started = time.monotonic()
        try:
            job.prepare()
            runs = self.results.setdefault(job.key, {}).setdefault(side, [])
            limit = LIMIT_OF_A_METHOD if job.method else LIMIT
            runs.append(job.run(side, min(limit, max(left, 1))))
        except Exception as error:  # whatever a section or a library does: the others are measured all the same
            self.results.setdefault(report.FAILED, {})[f"{job.key}, {side}"] = f"{error}"[:200]
            print(f"{job.key}, {side}: FAILED: {error}")
        self.took[job, side] = time.monotonic() - started
        print(f"{time.monotonic() - started:6.0f} s  {job.key}, {side}; {max(left, 0) / 60:.0f} min left", flush=True)
        if self.is_saved:
            report.keep(self.results)

    def _failed(self) -> set[tuple[str, str]]:
        return {(key.rpartition(", ")[0], key.rpartition(", ")[2]) for key in self.results.get(report.FAILED, {})}


def forget(results: report.Results, jobs: Iterable[Job]) -> None:
    """Drop earlier figures of ``jobs``."""
    failed = results.get(report.FAILED, {})
    for job in jobs:
        results.pop(job.key, None)
        for side in SIDES:
            failed.pop(f"{job.key}, {side}", None)


def named(sections: Iterable[str]) -> list[str]:
    """Return the sections to run; the section of the methods becomes one for each method."""
    each = [f"{METHODS}:{name}" for name in materials.METHODS]
    return [name for section in sections for name in (each if section == METHODS else [section])]


def run_script(name: str, *arguments: str) -> None:
    """Run a script that measures whole processes, and has a file of results of its own."""
    try:
        subprocess.run([sys.executable, str(HERE / name), *arguments], check=True, timeout=3 * LIMIT)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{name}: FAILED: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", choices=[[], *SECTIONS, *named([METHODS])], metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--model", choices=MODELS, help="both unless given")
    parser.add_argument("--dtype", choices=DTYPES, help="both unless given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=45, help="for all but the merge to disk, which takes up to 12")
    parser.add_argument("--resume", action="store_true", help="take up a run that was broken off")
    parser.add_argument("--quick", action="store_true", help="a look: one round, the small model, nothing kept")
    parser.add_argument("--report", action="store_true", help="write the report from what was measured before")
    asked = parser.parse_args()
    results: Any = report.read()
    if not asked.report:
        models = [asked.model] if asked.model else MODELS[: 1 if asked.quick else 2]
        dtypes = [asked.dtype] if asked.dtype else DTYPES[: 1 if asked.quick else 2]
        # The small model first, which is quick and says most.
        every = [Job(s, m, d) for m in models for d in dtypes for s in named(asked.sections or SECTIONS)]
        # The methods last, since they are many.
        jobs = sorted((job for job in every if job.is_meant), key=lambda job: bool(job.method))
        if asked.resume:
            results.pop(report.FAILED, None)  # to be tried again
        else:
            forget(results, jobs)
        run = Run(results, time.monotonic() + 60 * asked.minutes, not asked.quick)
        for number in range(1, 1 + (1 if asked.quick else asked.rounds)):
            # Their figures are ratios of one process each, and there are many: one round says enough.
            run.round([job for job in jobs if number == 1 or not job.method], number)
        if not asked.sections:
            run_script("start_up.py", *(["--repeats", "3"] if asked.quick else ["--keep"]))
            run_script("merge_to_disk.py", *(["--models", "135M"] if asked.quick else ["--keep"]))
    if not asked.quick:
        report.write(results)


if __name__ == "__main__":
    main()
