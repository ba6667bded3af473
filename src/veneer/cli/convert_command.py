"""``veneer convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.options import Base, BaseArgument, Json, Local, Revision, given_base
from veneer.cli.terminal import print_warnings, progress, show
from veneer.errors import UsageError
from veneer.printing import quiet


def convert(
    path: Annotated[str, typer.Argument(help="The adapter's folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base_argument: BaseArgument = None,
    to: Annotated[str, typer.Option(help="The method to convert to: lora.")] = "lora",
    rank: Annotated[int | None, typer.Option(help="Of the LoRA; needed where the change has no low rank.")] = None,
    base: Base = None,
    revision: Revision = None,
    json: Json = False,
    local_files_only: Local = False,
) -> None:
    """Write an adapter of any method as a plain LoRA, and say what error that leaves.

    Example: veneer convert path/to/adapter path/to/base --rank 16 --out as-lora
    """
    base = given_base(base_argument, base)
    if to != "lora":
        raise UsageError(f"--to {to!r} is none of the methods to convert to.", hint="There is: lora.")
    with quiet() as warnings, progress("converting"):
        from veneer.peft_model.convert_to_lora import convert_to_lora

        report = convert_to_lora(
            path, out=out, rank=rank, base=base, revision=revision, local_files_only=local_files_only
        )
    print_warnings(warnings)
    show(report, json)
