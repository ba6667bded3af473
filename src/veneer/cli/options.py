"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from veneer.configs.dtype_names import torch_name
from veneer.errors import UsageError
from veneer.files.paths import exists

F = TypeVar("F", bound=Callable[..., Any])


class _PathOrId(click.ParamType[str]):
    """A text that the shell completes as a path."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Let the shell list files and folders."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


A_PATH = click.Path(path_type=Path, readable=False)
PATH_OR_ID = _PathOrId()


class NumberRange(click.FloatRange):
    """A range that NaN is not in; for click it is in every one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number that is meant."""
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is no number.", param, ctx) if math.isnan(number) else number


def switch(name: str, help: str) -> Callable[[F], F]:
    """Make an option that takes no value."""
    return click.option(name, is_flag=True, help=help)


as_json = switch("--json", "Print JSON, for scripts.")
base = click.option("--base", type=PATH_OR_ID, help="The base: a folder or hub id. By default what the adapter names.")
base_argument = click.argument(
    "base_argument", metavar="[BASE]", type=PATH_OR_ID, required=False, help="The base, as --base has it."
)
dtype = click.option(
    "--dtype",
    default="auto",
    callback=lambda context, parameter, name: torch_name(name),
    help="auto (as on disk), bfloat16 (bf16), float16 (fp16), float32 (fp32).",
)
device = click.option("--device", help="Such as cuda; by default the CPU.")
local_files_only = switch("--local-files-only", "Use no network.")
overwrite = switch("--overwrite", "Replace an adapter that is at OUT.")
overwrite_model = switch("--overwrite", "Replace a model that is at OUT.")
revision = click.option("--revision", help="Branch, tag or commit on the hub.")


def given_base(argument: str | None, option: str | None) -> str | None:
    """Return the base that is given as an argument or as ``--base``."""
    if argument is not None and option is not None:
        raise UsageError(f"The base is given twice: {argument} and --base {option}.", hint="Leave out one of the two.")
    return option if argument is None else argument


def weighted(path: str | None, adapters: Iterable[str]) -> dict[str | Path, float]:
    """Return adapter -> weight, from ``PATH`` and ``PATH=WEIGHT``, in the order given."""
    weights: dict[str | Path, float] = {} if path is None else {path: 1.0}
    for text in adapters:
        name, weight = _split(text)
        if name in weights:
            raise UsageError(f"{name} is given twice.", hint="Give each once, with one weight.")
        weights[name] = weight
    return weights


def _split(text: str) -> tuple[str, float]:
    name, mark, weight = text.rpartition("=")
    if not mark or exists(Path(text)):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise UsageError(f"{text!r}: {weight!r} is no weight.", hint="Give PATH or PATH=0.7.")
    return name, value
