"""Runs a sample of peft's own tests on real peft (``baseline``) or on Veneer in peft's place (``measure``).

    python benchmarks/peer_suite/run.py baseline
    python benchmarks/peer_suite/run.py measure [FILE ...]
    python benchmarks/peer_suite/run.py report

README.md says how to set it up, and what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("PEER_SUITE_CACHE", Path.home() / ".cache" / "veneer-peer-suite"))
VERSION, ONE_IN = "0.21.2", 80
SUITE, HUB = CACHE / f"peft-{VERSION}", CACHE / "hf" / "hub"
OUTCOMES, TESTS = CACHE / "outcomes.jsonl", CACHE / "tests.txt"
BASELINE, EXCLUDED = HERE / "baseline.json", HERE / "excluded.toml"
# They need a GPU or packages for one, or run for minutes a test.
LEFT_OUT = ("common_gpu", "gpu_examples", "gptqmodel", "lora_megatron", "quantization", "torch_compile")
PACKAGES = ("peft", "torch", "transformers", "diffusers", "accelerate", "datasets")


def fetch() -> None:
    """Download the suite and write the stand-ins, unless they are there."""
    if not SUITE.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "--dest", CACHE]
        subprocess.run([*pip, f"peft=={VERSION}"], check=True)
        with tarfile.open(next(CACHE.glob(f"peft-{VERSION}.tar.gz"))) as archive:
            archive.extractall(CACHE, filter="data")
        # The tests import each other relatively, and the archive lacks what makes them a package.
        (SUITE / "tests" / "__init__.py").touch()
    if not HUB.is_dir():
        subprocess.run([sys.executable, HERE / "stand_ins.py", HUB], check=True, env=environment())


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a run: offline, on one thread, with Veneer's source and the plugin to import."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(HUB.parent),
        "HF_TOKEN": "none",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false", "PEER_OUTCOMES": str(OUTCOMES), **more}


def run(files: Iterable[str], **more: str) -> list[dict[str, Any]]:
    """Run tests of the suite and return the lines that the plugin wrote."""
    OUTCOMES.unlink(missing_ok=True)
    ignored = [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
    own = ["-p", "plugin", "-p", "no:cacheprovider", "-o", "addopts=", "--continue-on-collection-errors"]
    paths = [f"tests/{file}" for file in files] or ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-W", "ignore", *own, *ignored, *paths]
    subprocess.run(command, cwd=SUITE, env=environment(**more), check=False)
    return outcomes()


def outcomes() -> list[dict[str, Any]]:
    """Return the lines of the last run."""
    return [json.loads(line) for line in OUTCOMES.read_text().splitlines()]


def baseline() -> None:
    """Run the sample on real peft, and keep the tests that pass."""
    lines = run([], PEER_ONE_IN=str(ONE_IN))
    passing: dict[str, list[str]] = defaultdict(list)
    for test in sorted(line["id"] for line in lines if line["outcome"] == "passed"):
        file, _, rest = test.removeprefix("tests/").partition("::")
        passing[file].append(rest)
    versions = {package: metadata.version(package) for package in PACKAGES}
    counts = Counter(line["outcome"] for line in lines)
    BASELINE.write_text(json.dumps({"versions": versions, "outcomes": counts, "passing": passing}, indent=0) + "\n")


def passing() -> list[str]:
    """Return the tests that real peft passes."""
    files = json.loads(BASELINE.read_text())["passing"]
    return [f"tests/{file}::{rest}" for file, tests in files.items() for rest in tests]


def measure(files: list[str]) -> None:
    """Run what real peft passes on Veneer."""
    TESTS.write_text("\n".join(passing()))
    run(files, PEER_TESTS=str(TESTS), PEER_MODULE="veneer.as_peft")
    report(files)


def excluded() -> dict[str, str]:
    """Return the reason of each test that is left out, or of the function whose parametrisations are."""
    import tomllib

    groups = tomllib.loads(EXCLUDED.read_text())
    return {f"tests/{test}": group["reason"] for group in groups.values() for test in group["tests"]}


def counted(tests: Iterable[str], without: Iterable[str]) -> list[str]:
    """Return the tests that neither their own name nor their function's leaves out."""
    names = set(without)
    return [test for test in tests if test not in names and test.partition("[")[0] not in names]


def report(files: list[str]) -> None:
    """Print the share by file, and the failures by their errors, the most frequent first."""
    tests = [test for test in passing() if not files or file_of(test) in files]
    kept = counted(tests, excluded())
    lines = {line["id"]: line for line in outcomes()}
    good = {test for test in tests if lines.get(test, {}).get("outcome") == "passed"}
    print(table(tests, kept, good))
    groups: dict[str, list[str]] = defaultdict(list)
    for test in kept:
        if test not in good:
            groups[error_of(lines.get(test, {}))].append(test)
    for error, failed in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"{len(failed):4} {error}\n       {failed[0]}")


def file_of(test: str) -> str:
    """Return the name of a test's file."""
    return test.removeprefix("tests/").partition("::")[0]


def error_of(line: dict[str, Any]) -> str:
    """Return the first line of a test's error, without what differs from test to test."""
    error = str(line.get("error") or line.get("outcome") or "no outcome").strip().splitlines()[0]
    error = re.sub(r"/tmp/\S+", "PATH", error)
    error = re.sub(r"'\w+' object has no", "object has no", error)
    return re.sub(r"(to require gradients|Expected names to start with).*", r"\1 ...", error)[:200]


def table(tests: list[str], kept: list[str], good: set[str]) -> str:
    """Return the counts by file as a table of Markdown."""
    counts = {name: Counter(map(file_of, group)) for name, group in (("all", tests), ("kept", kept))}
    counts["good"] = Counter(file_of(test) for test in kept if test in good)
    rows = [(file, *(counts[name][file] for name in ("all", "kept", "good"))) for file in sorted(counts["all"])]
    total = ("all", *(counts[name].total() for name in ("all", "kept", "good")))
    head = ["| file | real peft passes | counted | Veneer passes | share |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row(*cells) for cells in [*rows, total])])


def row(file: str, everything: int, kept: int, good: int) -> str:
    """Return a line of the table."""
    return f"| {file} | {everything} | {kept} | {good} | {100 * good / max(1, kept):.1f} % |"


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("baseline", "measure", "report"))
    parser.add_argument("files", nargs="*", help="test files, such as test_auto.py")
    arguments = parser.parse_args()
    fetch()
    if arguments.what == "baseline":
        baseline()
    else:
        {"measure": measure, "report": report}[arguments.what](arguments.files)


if __name__ == "__main__":
    main()
