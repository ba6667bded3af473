"""Measures whole processes of the command line, from their start to their end, and what they import.

Each process is run `--repeats` times, all in turn; the least of its times is what the machine can do, since other work
can only add to it. What a package takes is the least time of each of its modules, by `-X importtime`, summed up; that
slows the imports by about a third. Packages that take less than a millisecond are left out.

    python benchmarks/start_up.py [--repeats 20] [--keep]

`--keep` writes the figures into `start_up.json`, from which `make bench` makes its table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import timeit
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

RESULTS_FILE = Path(__file__).parent / "start_up.json"
SOURCE = Path(__file__).parent.parent / "src"
ADAPTER = str(SOURCE / "veneer" / "demo" / "adapters" / "pirate")
HOOK = SOURCE / "veneer_as_peft.pth"

# Words -> arguments of Python, and the seconds that are the target.
CASES: dict[str, tuple[list[str], float | None]] = {
    "Python alone": (["-c", "pass"], None),
    "`import veneer`": (["-c", "import veneer"], None),
    "`veneer --version`": (["-m", "veneer", "--version"], 0.15),
    "`veneer --help`": (["-m", "veneer", "--help"], 0.15),
    "`veneer merge --help`": (["-m", "veneer", "merge", "--help"], 0.15),
    "`veneer inspect ADAPTER`": (["-m", "veneer", "inspect", ADAPTER], 0.2),
    "`veneer inspect ADAPTER --json`": (["-m", "veneer", "inspect", ADAPTER, "--json"], 0.2),
}


def seconds_of(arguments: list[str]) -> float:
    """Measure one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - started


def imports_of(arguments: list[str], repeats: int) -> dict[str, float]:
    """Return package -> seconds of its modules; those of Python's library together."""
    least: dict[str, float] = defaultdict(lambda: float("inf"))
    for _ in range(repeats):
        command = [sys.executable, "-X", "importtime", *arguments]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines():
            microseconds, _, module = (line.removeprefix("import time:") + "||").split("|")[:3]
            if microseconds.strip().isdigit():
                least[module.strip()] = min(least[module.strip()], int(microseconds) / 1e6)
    packages: Counter[str] = Counter()
    for module, seconds in least.items():
        package = module.partition(".")[0]
        packages["Python's library" if package in sys.stdlib_module_names else package] += seconds
    return {package: seconds for package, seconds in packages.most_common() if seconds >= 1e-3}


def hook() -> float:
    """Measure what the installed hook adds to every start of Python while it is not asked for."""
    return min(timeit.repeat(lambda: exec(HOOK.read_text()), number=100, repeat=5)) / 100


def measure(repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {words: [] for words in CASES}
    for _ in range(repeats):
        for words, (arguments, _) in CASES.items():
            times[words].append(seconds_of(arguments))
    rows = {
        words: {
            "least": min(times[words]),
            "median": statistics.median(times[words]),
            "target": target,
            "imports": imports_of(arguments, max(3, repeats // 4)) if target else {},
        }
        for words, (arguments, target) in CASES.items()
    }
    return {"processes": rows, "hook": hook()}


def table(results: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    lines = ["| process | least | median | target | | most time for imports |", "|---|--:|--:|--:|---|---|"]
    for words, row in results["processes"].items():
        imports = ", ".join(f"{package} {_ms(seconds)}" for package, seconds in row["imports"].items())
        target, met = ("", "") if row["target"] is None else (_ms(row["target"]), _verdict(row))
        lines.append(f"| {words} | {_ms(row['least'])} | {_ms(row['median'])} | {target} | {met} | {imports} |")
    hook = (
        f"The hook for `VENEER_AS_PEFT` costs each start of Python {results['hook'] * 1e3:.2f} ms where it is not used."
    )
    return "\n".join([*lines, "", hook])


def _verdict(row: dict[str, Any]) -> str:
    return "met" if row["least"] <= row["target"] else "missed"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    results = measure(asked.repeats)
    print(table(results))
    if asked.keep:
        RESULTS_FILE.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
