"""``veneer bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli import options
from veneer.cli.options import A_PATH, PATH_OR_ID, NumberRange, switch
from veneer.cli.terminal import for_stdout, print_warnings, show
from veneer.errors import PathNotFoundError, UsageError
from veneer.files.paths import exists
from veneer.printing import one_line, quiet

if TYPE_CHECKING:
    from veneer.benching.measure.progress import Progress

_PATHS = "An adapter, a set of adapters, or a base model; then further adapters of the same base."


@click.command()
@click.argument("paths", metavar="[PATH]...", type=PATH_OR_ID, nargs=-1, help=_PATHS)
@options.base
@click.option(
    "--adapters",
    type=PATH_OR_ID,
    multiple=True,
    help="Further adapters, or some of a set by name; others may follow it.",
)
@click.option("--batch", default="1,8", help="Rows of the inputs, with commas.")
@click.option("--prompt-tokens", help="Tokens of a row; 128,512 if they fit.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, help="Tokens of an answer.")
@options.dtype
@options.device
@click.option("--prompts", type=A_PATH, help="A text file, a prompt on each line.")
@click.option(
    "--perplexity",
    type=A_PATH,
    help="A text file or JSON Lines, to measure how well base and adapters predict it.",
)
@click.option("--traffic", help='How requests spread over the adapters: "a=80,b=20".')
@click.option("--memory", help="What serving may take, such as 16GB; by default all.")
@click.option(
    "--change-every",
    "requests_per_change",
    metavar="REQUESTS",
    type=NumberRange(min=1),
    help="Requests between two changes of the adapters; by default never.",
)
@click.option(
    "--in-flight",
    metavar="REQUESTS",
    type=click.IntRange(min=1),
    help="Requests at the same time; by default the largest batch.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Timed rounds.")
@click.option("--out", type=A_PATH, default="report", help="The folder for the report.")
@options.as_json
@switch("--compare", "Compare two reports: --compare OLD NEW.")
@options.local_files_only
def bench(
    paths: tuple[str, ...],
    adapters: tuple[str, ...],
    batch: str,
    prompt_tokens: str | None,
    prompts: Path | None,
    perplexity: Path | None,
    traffic: str | None,
    memory: str | None,
    out: Path,
    json: bool,
    compare: bool,
    **measuring: Any,
) -> None:
    """Measure merged against unmerged on this machine, and say whether to merge.

    Example: veneer bench path/to/adapter path/to/another --base path/to/base
    """
    if compare:
        _compare(paths, json)
        return
    if not paths:
        raise UsageError("There is nothing to measure.", hint="`veneer bench PATH`, an adapter's folder or hub id.")
    from veneer.benching import arguments
    from veneer.benching.report.files import check, write

    parsed: dict[str, Any] = {
        "batch": arguments.counts(batch, "--batch"),
        "prompt_tokens": None if prompt_tokens is None else arguments.counts(prompt_tokens, "--prompt-tokens"),
        "traffic": None if traffic is None else arguments.shares(traffic, "--traffic"),
        "memory": None if memory is None else arguments.size(memory, "--memory"),
    }
    check(out, [file for file in (prompts, perplexity) if file is not None])
    plots = not json or find_spec("matplotlib") is not None
    with quiet() as warnings, _bar() as on_progress:
        from veneer.benching.run import bench as measure

        report = measure(
            paths[0],
            adapters=[*adapters, *paths[1:]],
            prompts=prompts,
            perplexity=perplexity,
            on_progress=_after_checking_plots(on_progress) if plots else on_progress,
            **parsed,
            **measuring,
        )
        page = write(report, out, plots)
    print_warnings(warnings)
    show(report, json)
    if not json:
        print(f"The report is {for_stdout(str(page))}, with report.md and report.json beside it.")


def _compare(paths: Sequence[str], json: bool) -> None:
    from veneer.benching.compare import compare
    from veneer.benching.report.files import read

    if len(paths) != 2:
        raise UsageError(f"--compare takes two reports, not {len(paths)}.", hint="veneer bench --compare OLD NEW")
    for path in paths:
        if not exists(Path(path)):
            raise PathNotFoundError(f"{path} does not exist.", hint="Give a report's folder, or a run's JSON file.")
    show(compare(*(read(Path(path)) for path in paths)), json)


def _after_checking_plots(on_progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Check for the first step that the plots can be drawn: after the arguments, before anything is measured."""
    from veneer.benching.report.files import check_plots

    def checked(progress: Progress) -> None:
        if not progress.done:
            check_plots()
        on_progress(progress)

    return checked


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar with the time left, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda progress: None
        return
    columns = (BarColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, left="")
        yield lambda progress: _advance(bar, task, progress)


def _advance(bar: Any, task: Any, progress: Progress) -> None:
    from rich.markup import escape

    from veneer.benching import formats

    bar.update(
        task,
        description=escape(one_line(progress.text)),
        completed=progress.done,
        total=None if progress.left is None else progress.done + progress.left,
        left="" if progress.left is None else f"{formats.seconds(progress.left)} left",
    )
