"""Turns what was measured into tables with a verdict on each target, a plot, and the figures in README and docs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import bank
import kept_merged
import materials
import merge_to_disk
import saved_bytes
import serving
import start_up
from lines import quantity, rounded

HERE = Path(__file__).parent
RESULTS_FILE, TABLE, PLOT = HERE / "results.json", HERE / "RESULTS.md", HERE / "results.svg"
NOTES = HERE / "notes.md"
BEGIN, END = "<!-- speed: made by make bench -->\n", "<!-- end of speed -->"
SERVE_PAGE = HERE.parent / "docs" / "serve.md"
SERVE_BEGIN, SERVE_END = "<!-- serving: made by benchmarks/run.py --report -->\n", "<!-- end of serving -->"
SERVING_HEAD = """## Speed

SmolLM2-135M in bfloat16 on a CPU. Each client sends its next request when it has its answer: a prompt of 16 tokens, 16
to 48 more. Both figures of a line come from one run, so that ratios hold; absolute ones are the
[machine's](../benchmarks/RESULTS.md). The targets were set before it was built."""
# The scripts with a file of results of their own, and the titles of their sections.
SCRIPTS = {
    serving: "The server",
    bank: "Banks of adapters",
    kept_merged: "Merged copies beside the base",
    saved_bytes: "What a training step keeps in memory",
    merge_to_disk: "Merging from disk to disk, whole processes",
    start_up: "The start of the command line, whole processes",
}
# Where in the results stands what could not be measured: "section model dtype, side" -> why.
FAILED = "failed"
# Two sides that differ by no more cannot be told apart: a process of either differs as much from the next one.
NOISE = 0.03
Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: in words.
        run: section, model and dtype, as in the results' keys.
        figure: the figure compared; divided by ``over`` (of the same run and side), if given.
        faster: a target: how many times the peer's figure must be Veneer's.
        most: a target: the most that Veneer's figure may be.
    """

    what: str
    run: str
    figure: str
    over: str | None = None
    faster: float | None = None
    most: float | None = None


def rows() -> list[Row]:
    """Return every line, with the targets of the project."""
    both = ("bfloat16", "float32")
    small, large = [f"135M {dtype}" for dtype in both], [f"1B {dtype}" for dtype in both]
    lines = [
        Row("attach the 1st adapter", "attach 135M bfloat16", "attach 1", faster=10),
        Row("attach the 2nd", "attach 135M bfloat16", "attach 2", faster=10),
        Row("attach the 16th", "attach 135M bfloat16", "attach 16", faster=40),
        Row("attach the 100th / the 2nd", "attach 135M bfloat16", "attach 100", "attach 2", most=1.25),
        Row("attach the 1,000th / the 2nd", "attach 135M bfloat16", "attach 1000", "attach 2", most=1.25),
        Row("an attached adapter, own memory beside its file's (MB)", "attach 135M bfloat16", "attach, MB"),
        Row("attach the 1st adapter", "attach 1B bfloat16", "attach 1", faster=10),
        Row("attach the 2nd", "attach 1B bfloat16", "attach 2", faster=10),
        Row("attach the 100th / the 2nd", "attach 1B bfloat16", "attach 100", "attach 2", most=1.25),
        Row("switch the active adapter", "attach 135M bfloat16", "switch", most=0.05e-3),
    ]
    for on, limit in [*((on, 1.10) for on in small), *((on, 1.05) for on in large)]:
        lines.append(Row("decode, unmerged / merged", f"forward {on}", "decode unmerged", "decode merged", most=limit))
    # A target holds for as many tokens as it names: 512, and 64 in each of 8 rows. The large model is given fewer.
    for on, limit in [*((on, 1.05) for on in small), *((on, None) for on in large)]:
        words = "prefill, unmerged / merged" if limit is None else "prefill 512, unmerged / merged"
        lines.append(Row(words, f"forward {on}", "prefill unmerged", "prefill merged", most=limit))
    for on in (*small, *large):
        lines.append(Row("training step", f"train {on}", "train step", faster=1))
    for on in (*small, large[0]):
        for count in (2, 4, 8):
            what = f"8 rows, {count} adapters / one,"
            run = f"mixed {on}"
            lines.append(Row(f"{what} decode", run, f"mixed decode {count}", "mixed decode one", most=1.25))
            limit = 1.10 if on in small else None
            lines.append(Row(f"{what} prefill", run, f"mixed prefill {count}", "mixed prefill one", most=limit))
    lines.append(
        Row(
            "64 rows, 64 adapters / one, decode",
            "mixed64 135M bfloat16",
            "64 rows decode 64",
            "64 rows decode one",
            most=1.25,
        )
    )
    for on, times in [*((on, 8) for on in small), *((on, 12) for on in large)]:
        lines.append(Row("merge in memory", f"merge {on}", "merge", faster=times))
        lines.append(Row("unmerge", f"merge {on}", "unmerge"))
        lines.append(Row("merge and unload", f"merge {on}", "merge and unload", faster=times))
    for on in (*small, *large):
        lines.append(Row("load merged / load the base", f"load {on}", "load merged", "load base"))
        lines.append(Row("load merged, peak memory (MB)", f"load {on}", "peak of load merged, MB"))
        lines.append(Row("in use, peak memory (MB)", f"memory {on}", "peak in use, MB"))
    lines += [
        Row("save an adapter", "save 135M bfloat16", "save", faster=1),
        Row("import, after torch and transformers", "process 135M bfloat16", "import after torch"),
        Row("import alone", "process 135M bfloat16", "import", most=0.05),
        Row("inspect, whole process", "process 135M bfloat16", "inspect", most=0.2),
    ]
    for name in materials.METHODS:
        for how in ("decode", "prefill"):
            lines.append(Row(f"{name} / base, {how}", f"methods:{name} 135M bfloat16", how))
    return lines


def value(row: Row, results: Results, side: str) -> float | None:
    """Return a row's figure for one side: the median over the rounds; ``None`` where it was not measured."""
    runs = results.get(row.run, {}).get(side, [])
    values = [run[row.figure] / (run[row.over] if row.over else 1) for run in runs if row.figure in run]
    return statistics.median(values) if values else None


def verdict(row: Row, ours: float, theirs: float | None) -> tuple[str, str]:
    """Write the target in words, and whether it is met."""
    if theirs is not None and (row.faster == 1 or row.run.startswith("methods")):
        return "no slower", "met" if ours <= theirs else "equal" if ours <= theirs * (1 + NOISE) else "missed"
    if row.faster is not None and theirs is not None:
        return f"{row.faster:g}x faster", "met" if theirs / ours >= row.faster else "missed"
    if row.most is not None:
        limit = row.most if row.over else f"{_seconds(row.most)}"
        return f"at most {limit}", "met" if ours <= row.most else "missed"
    return "", ""


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 3}f} ms"


def shown(row: Row, number: float | None) -> str:
    if number is None:
        return ""
    if row.over or row.run.startswith("methods"):
        return f"{number:.2f}"
    return f"{number:.0f}" if row.figure.endswith("MB") else _seconds(number)


def table(results: Results) -> str:
    lines = ["| what | on | peft | Veneer | peft / Veneer | target | |", "|---|---|---|---|---|---|---|"]
    for row in rows():
        ours, theirs = value(row, results, "veneer"), value(row, results, "peft")
        if ours is None:
            continue
        on = row.run.partition(" ")[2]
        ratio = "" if theirs is None else f"{theirs / ours:.1f}"
        target, met = verdict(row, ours, theirs)
        lines.append(f"| {row.what} | {on} | {shown(row, theirs)} | {shown(row, ours)} | {ratio} | {target} | {met} |")
    return "\n".join(lines)


def show(key: str, runs: Results) -> None:
    """Print a section's medians as they come."""
    print(key)
    names = list(dict.fromkeys(name for side in runs.values() for run in side for name in run))
    for name in names:
        ours, theirs = (
            statistics.median([run[name] for run in runs.get(side, []) if name in run] or [float("nan")])
            for side in ("veneer", "peft")
        )
        print(f"  {name:28} veneer {ours:10.5f}   peft {theirs:10.5f}   peft/veneer {theirs / ours:7.2f}", flush=True)


def read() -> Results:
    results: Results = json.loads(RESULTS_FILE.read_text()) if RESULTS_FILE.exists() else {}
    return results


def keep(results: Results) -> None:
    RESULTS_FILE.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores of {_processor()}."


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def write(results: Results) -> None:
    """Write the table with the notes on it, the plot, and the README's figures."""
    text = NOTES.read_text() if NOTES.exists() else ""
    TABLE.write_text(
        "# Veneer beside peft\n\nMade by `make bench`; do not edit. " + machine() + "\n\n"
        "![Veneer beside peft](results.svg)\n\n"
        + table(results)
        + "\n\n"
        + "\n".join(remarks(results))
        + "\n\n"
        + "".join(section(script, f"## {title}") for script, title in SCRIPTS.items())
        + text
    )
    plot(results)
    for file, words in READMES.items():
        file.write_text(with_speed(file.read_text(encoding="utf-8"), results, words), encoding="utf-8")
    SERVE_PAGE.write_text(with_serving(SERVE_PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def remarks(results: Results) -> list[str]:
    """Write how often everything was measured, and what was not measured."""
    counts = sorted({len(runs) for key, sides in results.items() if key != FAILED for runs in sides.values() if runs})
    rounds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))
    missing = sorted({row.run for row in rows() if value(row, results, "veneer") is None})
    texts = [
        f"Each figure is the median of {rounds} processes a side, which took turns; sides that differ by at most "
        f"{NOISE:.0%} are called equal."
    ]
    if missing:
        texts.append(f"Not measured: {'; '.join(missing)}.")
    return texts + [f"Failed: {what}: {why}." for what, why in sorted(results.get(FAILED, {}).items())]


@dataclass(frozen=True)
class Words:
    """The words of a README's table; ``{}`` stands for a number.

    Attributes:
        head: of the columns.
        lines: in the order of ``HEADLINES``.
        faster, equal, slower: the verdict on two times.
        less, more: the verdict on two overheads.
        alone: the verdict on a figure that peft has not.
    """

    head: tuple[str, str, str, str]
    lines: tuple[str, ...]
    faster: str
    equal: str
    slower: str
    less: str
    more: str
    alone: str


# Where the README's lines stand above.
HEADLINES = (
    ("attach 135M bfloat16", "attach 1", None),
    ("attach 135M bfloat16", "attach 16", None),
    ("attach 135M bfloat16", "switch", None),
    ("forward 135M bfloat16", "decode unmerged", "decode merged"),
    ("mixed 135M bfloat16", "mixed decode 8", "mixed decode one"),
    ("train 135M bfloat16", "train step", None),
    ("merge 135M bfloat16", "merge", None),
    ("merge 1B bfloat16", "merge", None),
    ("save 135M bfloat16", "save", None),
    ("process 135M bfloat16", "import after torch", None),
    ("process 135M bfloat16", "inspect", None),
)
ENGLISH = Words(
    head=("SmolLM2-135M, bfloat16, LoRA of rank 16", "peft", "Veneer", "verdict"),
    lines=(
        "Attach the first adapter",
        "Attach the 16th",
        "Switch the active adapter",
        "A decode step: time that an unmerged adapter adds",
        "A decode step of 8 rows: time that 8 adapters add to one's",
        "Training step",
        "Merge in memory",
        "The same, a base of 1B",
        "Save an adapter",
        "Import, after torch and transformers",
        "`veneer inspect`, the whole process",
    ),
    faster="{} times faster",
    equal="as fast",
    slower="{} times slower",
    less="{} times less",
    more="{} times more",
    alone="peft has none",
)
CHINESE = Words(
    head=("SmolLM2-135M，bfloat16，秩为 16 的 LoRA", "peft", "Veneer", "结论"),
    lines=(
        "挂载第一个适配器",
        "挂载第 16 个",
        "切换激活的适配器",
        "一步解码：未合并的适配器增加的时间",
        "8 行的一步解码：8 个适配器比一个增加的时间",
        "一步训练",
        "在内存中合并",
        "同上，十亿参数的基座模型",
        "保存一个适配器",
        "导入（torch 和 transformers 之后）",
        "`veneer inspect`，整个进程",
    ),
    faster="速度是其 {} 倍",
    equal="一样快",
    slower="速度是其 1/{}",
    less="只有其 1/{}",
    more="是其 {} 倍",
    alone="peft 没有",
)
READMES = {HERE.parent / "README.md": ENGLISH, HERE.parent / "README.zh-CN.md": CHINESE}


def speed(results: Results, words: Words) -> str:
    """Write the README's table."""
    lines = [f"| {' | '.join(words.head)} |", "|---|--:|--:|---|"]
    for what, (run, figure, over) in zip(words.lines, HEADLINES, strict=True):
        row = Row(what, run, figure, over)
        ours, theirs = value(row, results, "veneer"), value(row, results, "peft")
        if ours is not None:
            lines.append(
                f"| {what} | {_short(row, theirs)} | {_short(row, ours)} | {_judged(row, ours, theirs, words)} |"
            )
    return "\n".join(lines) + "\n"


def _short(row: Row, number: float | None) -> str:
    if number is None:
        return "–"  # noqa: RUF001 - an en dash, as tables have it
    if row.over:
        return f"{100 * (number - 1):.0f} %"
    return quantity(number, "s")


def _judged(row: Row, ours: float, theirs: float | None, words: Words) -> str:
    if theirs is None:
        return words.alone
    ratio = (theirs - 1) / (ours - 1) if row.over else theirs / ours
    if abs(ratio - 1) <= NOISE:
        return words.equal
    better, worse = (words.less, words.more) if row.over else (words.faster, words.slower)
    return better.format(rounded(ratio)) if ratio > 1 else worse.format(rounded(1 / ratio))


def with_speed(text: str, results: Results, words: Words) -> str:
    """Replace the table between a README's marks."""
    return _between(text, BEGIN, END, speed(results, words))


def with_serving(text: str) -> str:
    """Replace the figures of the server between the marks of its page."""
    return _between(text, SERVE_BEGIN, SERVE_END, section(serving, SERVING_HEAD))


def _between(text: str, begin: str, end: str, made: str) -> str:
    before, _, rest = text.partition(begin)
    return before + begin + made + end + rest.partition(end)[2]


def section(script: ModuleType, head: str) -> str:
    """Write a script's figures below a heading; empty where it has kept none."""
    if not script.RESULTS_FILE.exists():
        return ""
    table = script.table(json.loads(script.RESULTS_FILE.read_text()))
    return f"{head}\n\nMade by `benchmarks/{script.__name__}.py`.\n\n{table}\n\n"


def plot(results: Results) -> None:
    """Plot the ratios of the times on a logarithmic scale, and the overheads."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "veneer"
    speeds = [r for r in rows() if not r.over and not r.figure.endswith("MB") and "methods" not in r.run]
    ratios = [r for r in rows() if r.over and ("forward" in r.run or "mixed" in r.run)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7))
    _bars(left, [(r, (value(r, results, "peft") or 0) / (value(r, results, "veneer") or 1)) for r in speeds])
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("times faster than peft")
    for side, colour, offset in (("peft", "#c0c0c0", 0.2), ("veneer", "#2a7f9e", -0.2)):
        bars = [(r, value(r, results, side) or 0) for r in ratios if value(r, results, "veneer")]
        right.barh([i + offset for i in range(len(bars))], [v for _, v in bars], 0.4, color=colour, label=side)
        right.set_yticks(range(len(bars)), [_label(r) for r, _ in bars], fontsize=7)
    right.axvline(1, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.set_title("cost, relative (1 is no overhead)")
    right.legend()
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, bars: list[tuple[Row, float]]) -> None:
    bars = [(row, number) for row, number in bars if number > 0]
    axes.barh(range(len(bars)), [number for _, number in bars], color="#2a7f9e")
    axes.set_yticks(range(len(bars)), [_label(row) for row, _ in bars], fontsize=7)
    for index, (_, number) in enumerate(bars):
        axes.text(number, index, f" {number:.1f}", va="center", fontsize=7)
    axes.invert_yaxis()


def _label(row: Row) -> str:
    return f"{row.what}, {row.run.partition(' ')[2].replace('bfloat16', 'bf16').replace('float32', 'fp32')}"
