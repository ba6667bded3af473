"""Makes the tables and texts of a report, the same for the terminal, HTML and Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from veneer.benching import formats
from veneer.benching.decide.cost_model import ServingPlan
from veneer.benching.measure.statistics import Spread
from veneer.benching.result import VARIANTS, BenchData, Figure

ABSENT = "–"  # noqa: RUF001 - an en dash, as tables have it
# With more adapters than this only some plans are shown.
_MOST_PLANS = 8
_LOADED = {"base": "base alone", "unmerged": "with its adapters", "merged": "merged while loading"}


@dataclass(frozen=True)
class ReportTable:
    """Rows of text under a title.

    Attributes:
        title: of the table.
        columns: the heads; the first column names the row.
        rows: a text for each column.
        note: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """A quantity as it is shown.

    Attributes:
        title: of its table and plot.
        quantity: of the figure that it comes from.
        unit: of the plotted value.
        value: seconds of the figure, rows, length -> the plotted value.
        text: the same -> the text in the table.
        more_is_better: whether larger is better.
    """

    title: str
    quantity: str
    unit: str
    value: Callable[[float, int, int], float]
    text: Callable[[float, int, int], str]
    more_is_better: bool


def _rate(seconds: float, amount: int) -> float:
    return amount / seconds if seconds else 0.0


def measures(report: BenchData) -> list[Measure]:
    """Return the quantities of speed that are shown for this kind of model."""
    unit = f"{report.setup.unit}s"

    def shown(amount: Callable[[int, int], int]) -> tuple[Callable[..., float], Callable[..., str]]:
        return (
            lambda seconds, rows, length: _rate(seconds, amount(rows, length)),
            lambda seconds, rows, length: formats.number(_rate(seconds, amount(rows, length))),
        )

    time_ = (lambda seconds, rows, length: 1e3 * seconds, lambda seconds, rows, length: formats.seconds(seconds))
    if report.setup.kind == "forward":
        per_second = shown(lambda rows, length: rows)
        return [
            Measure("Forward pass", "forward", "ms", *time_, more_is_better=False),
            Measure("Throughput, rows a second", "forward", "rows/s", *per_second, more_is_better=True),
        ]
    decoded = Measure(
        "Decoding, tokens a second", "decode", "tokens/s", *shown(lambda rows, length: rows), more_is_better=True
    )
    first = Measure("Time to the first token", "first", "ms", *time_, more_is_better=False)
    if not report.setup.lengths:
        return [decoded, first]
    prefill = shown(lambda rows, length: rows * length)
    return [
        decoded,
        first,
        Measure(f"Prefill, {unit} a second", "first", f"{unit}/s", *prefill, more_is_better=True),
    ]


def sizes(report: BenchData) -> list[tuple[int, int]]:
    """Return rows and length of each input that was measured."""
    return [(rows, length) for rows in report.setup.batch for length in report.setup.lengths or (0,)]


def size_name(report: BenchData, size: tuple[int, int]) -> str:
    """Name a size such as ``8 rows of 128``."""
    rows, length = size
    return formats.count(rows, "row") + (f" of {length}" if length else "")


def present(report: BenchData) -> list[str]:
    """Return the variants that were measured, in their order."""
    speed = {"first", "decode", "forward"}
    return [v for v in VARIANTS if any(f.variant == v and f.quantity in speed for f in report.figures)]


def speed_table(report: BenchData, measure: Measure) -> ReportTable:
    """Make the table of one quantity: a row for each variant, a column for each size."""
    rows = []
    for variant in present(report):
        figures = [(report.find(measure.quantity, variant, *size), size) for size in sizes(report)]
        rows.append((VARIANTS[variant], *(_with_spread(figure, measure, size) for figure, size in figures)))
    return ReportTable(measure.title, ("", *(size_name(report, size) for size in sizes(report))), tuple(rows))


def _with_spread(figure: Figure | None, measure: Measure, size: tuple[int, int]) -> str:
    if figure is None:
        return ABSENT
    return measure.text(figure.spread.median, *size) + _off(figure.spread)


def _off(spread: Spread) -> str:
    return f" ±{formats.percent(spread.relative)}" if spread.count > 1 and spread.relative else ""


def loading_table(report: BenchData) -> ReportTable:
    """Make the table of load time, memory and disk of base, unmerged and merged."""
    rows = []
    adapters = sum(a.nbytes for a in report.setup.adapters)
    resident = sum(f.samples[0] for f in report.figures if f.quantity == "weights" and f.variant.startswith("adapter "))
    more = {"base": (0.0, 0.0), "unmerged": (resident, adapters), "merged": (0.0, 0.0)}
    for variant, name in _LOADED.items():
        load = report.find("load", variant)
        held = [report.find(quantity, variant) for quantity in ("peak", "serving")]
        source = "merged" if variant == "merged" else "base"
        weights, disk = (report.find(quantity, source) for quantity in ("weights", "disk"))
        extra_weights, extra_disk = more[variant]
        rows.append(
            (
                name,
                formats.seconds(load.spread.median) + _off(load.spread) if load else ABSENT,
                *(formats.nbytes(figure.samples[0]) if figure else ABSENT for figure in held),
                formats.nbytes(weights.samples[0] + extra_weights) if weights else ABSENT,
                formats.nbytes(disk.samples[0] + extra_disk) if disk else ABSENT,
            )
        )
    columns = ("model", "load", "peak memory", "peak while answering", "weights in memory", "weights on disk")
    return ReportTable("Loading, memory and files", columns, tuple(rows), _NOTES["loading"])


def actions_table(report: BenchData) -> ReportTable:
    """Make the table of actions on adapters, and their times."""
    actions = {
        "attach one adapter": ("attach", "unmerged"),
        "merge one adapter in memory": ("merge", "merged"),
        "take it out again": ("unmerge", "merged"),
        "make the merged copy of one adapter": ("keep", "resident"),
        "switch to another adapter": ("switch", "switching"),
    }
    rows = []
    for name, key in actions.items():
        figure = report.find(*key)
        if figure is not None:
            rows.append((name, formats.seconds(figure.spread.median) + _off(figure.spread), f"{figure.spread.count}"))
    return ReportTable("What is done to adapters", ("action", "time", "samples"), tuple(rows))


def fidelity_table(report: BenchData) -> ReportTable:
    """Make the table of merged against unmerged, a row for each adapter."""
    rows = []
    for fidelity in report.fidelity:
        texts = ABSENT if fidelity.same_texts is None else f"{fidelity.same_texts} of {fidelity.prompts}"
        agreement = ABSENT if fidelity.agreement is None else formats.percent(fidelity.agreement)
        drift = (formats.percent(fidelity.drift), formats.percent(fidelity.share_of_effect))
        rows.append((fidelity.adapter, *drift, agreement, texts, f"{fidelity.positions}"))
    columns = ("adapter", "largest drift", "of its effect", "same choice", "same answer", "positions")
    return ReportTable("Merged against unmerged", columns, tuple(rows), _NOTES["fidelity"])


def perplexity_table(report: BenchData) -> ReportTable:
    """Make the table of perplexity, a row for the base and for each adapter; none where no texts were given."""
    rows, note = [], ""
    for found in report.perplexity:
        merged = ABSENT if found.merged is None else formats.number(found.merged, 4)
        change = found.unmerged / report.perplexity[0].unmerged - 1
        against = ("+" if change > 0 else "") + formats.percent(change) if found.adapter else ABSENT
        rows.append((found.adapter or _LOADED["base"], formats.number(found.unmerged, 4), merged, against))
        note = (
            f"The lower, the better {report.setup.texts} is predicted: exp of the mean negative log-likelihood of "
            f"{formats.count(found.tokens, 'token')}. Long texts are read {formats.count(found.window, 'token')} at a "
            "time, of which half are known from before."
        )
    columns = ("model", "unmerged", "merged", "against the base")
    return ReportTable("Perplexity", columns, tuple(rows), note)


def shown_plans(report: BenchData) -> list[tuple[int, ServingPlan]]:
    """Return the plans that are shown, with their index: all, or of many the first, the last and some between."""
    advice = report.recommendation
    last = len(advice.plans) - 1
    telling = {0, last, advice.chosen, advice.compared, *(2**power for power in range(last.bit_length()))}
    return [(index, plan) for index, plan in enumerate(advice.plans) if last <= _MOST_PLANS or index in telling]


def plans_table(report: BenchData) -> ReportTable:
    """Make the table of the plans that were weighed."""
    advice = report.recommendation
    rows = []
    for index, plan in shown_plans(report):
        name = f"merge {formats.listed(plan.merged)}" if plan.merged else "merge none"
        name += ", beside the base" if plan.resident else ""
        mark = "recommended" if index == advice.chosen else "" if plan.fits else "does not fit"
        change = formats.seconds(plan.change) if plan.change else ABSENT
        rows.append((name, formats.seconds(plan.request), change, formats.nbytes(plan.memory), mark))
    columns = ("plan", "a request", "changes, a request", "memory", "")
    return ReportTable("Ways of serving the adapters", columns, tuple(rows), _assumed(report))


def _assumed(report: BenchData) -> str:
    advice = report.recommendation
    shares = formats.listed([f"{name} {formats.percent(share)}" for name, share in advice.traffic.items()])
    every = advice.requests_per_change
    changes = "never change" if every is None else f"change every {formats.count(every, 'request')}"
    return (
        f"Assumed: traffic {shares}; {formats.count(advice.in_flight, 'request')} in flight; the adapters {changes}; "
        f"{formats.nbytes(advice.memory)} of memory. Gains below {formats.percent(advice.margin)} count as noise."
    )


def context(report: BenchData) -> str:
    """Name the model, the machine and the day in one line."""
    setup, machine = report.setup, report.machine
    model = f"{setup.model_class}, {formats.short_count(setup.parameters)} parameters, {setup.dtype}"
    place = machine.accelerator or f"{machine.cpu}, {formats.count(machine.cores, 'core')}"
    return " · ".join((model, place, report.made.partition("T")[0]))


def facts(report: BenchData) -> list[tuple[str, str]]:
    """Return name and text of each fact on the run: models, inputs, machine, time."""
    setup, machine = report.setup, report.machine
    adapters = [
        f"{a.name} ({a.method}, {a.layers} layers, {formats.nbytes(a.nbytes)}, {a.origin})" for a in setup.adapters
    ]
    inputs = f"batches of {formats.listed(list(map(str, setup.batch)), len(setup.batch))}"
    if setup.lengths:
        inputs += f", {formats.listed(list(map(str, setup.lengths)), len(setup.lengths))} {setup.unit}s a row"
    if setup.new_tokens:
        inputs += f", {setup.new_tokens} new tokens"
    return [
        ("base", f"{setup.base}: {setup.model_class}, {formats.number(setup.parameters)} parameters, {setup.dtype}"),
        ("adapters", "; ".join(adapters)),
        ("inputs", f"{inputs}; {setup.prompts}"),
        ("samples", f"{setup.repeats} rounds after a warm-up"),
        ("device", machine.accelerator or setup.device),
        ("processor", f"{machine.cpu}, {formats.count(machine.cores, 'core')}, {machine.threads} used by torch"),
        ("memory", formats.nbytes(machine.memory)),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("made", f"{report.made}, in {formats.seconds(report.seconds)}"),
    ]


def tables(report: BenchData) -> list[ReportTable]:
    """Return every table, in the order in which they are shown."""
    tables = [speed_table(report, measure) for measure in measures(report)]
    tables += [loading_table(report), actions_table(report), fidelity_table(report), perplexity_table(report)]
    return [table for table in tables if table.rows]


def samples_table(report: BenchData) -> ReportTable:
    """Make the table of raw samples."""
    rows = []
    for figure in report.figures:
        size = size_name(report, (figure.batch, figure.length or 0)) if figure.batch else ABSENT
        shown = formats.seconds if figure.unit == "s" else formats.nbytes
        rows.append((figure.quantity, figure.variant, size, "  ".join(map(shown, figure.samples))))
    return ReportTable("Raw samples", ("quantity", "variant", "input", "samples, in order"), tuple(rows))


_NOTES = {
    "loading": (
        "Fresh processes, after the imports. Peaks hold the memory of the process itself; the answer is that to the "
        "largest input. A merged folder on disk loads as the base does."
    ),
    "fidelity": (
        "Largest drift: of a logit, as a share of the largest logit. Of its effect: the mean drift as a share of what "
        "the adapter changes. Same choice: positions with the same likeliest token or class."
    ),
}

HOW = (
    "Times are medians; ± is the larger half of the median's 95 % interval, by the bootstrap over the rounds.",
    "Base, merged and unmerged are models in one process that share every weight they have in common; so is the one "
    "whose merged copy is kept beside the base (keep_merged). In each "
    "round each of them runs each input once, in an order that rotates, so that drift of the machine meets all alike.",
    "Before the first round each runs each input once, untimed.",
    "The time to the first token is from the call of generate to the choice of its first token, and holds the prefill. "
    "Decoding is the mean of the steps after it. Decoding is greedy, and does not stop early.",
    "Switching: each run uses another adapter than the one before it. Mixed batch: the adapters take turns from row "
    "to row of one batch.",
    "Merging and taking out are timed in memory, with the weights resident. Loading is timed in fresh processes, the "
    "imports apart.",
    "Answers are compared on the same model before and after its merge. A model that generates is compared along its "
    "own unmerged answer, so that one close call does not count again and again.",
)
